"""Write the pages anew: python tutorials/pages.py

Of the stored results (results/*.json, findings/*.json): results/*.md, of which schemes.md is made
of the schemes' own files too (schemes_page.py), findings/findings.md, the answer that they give,
findings/self-activation.md, in ../README.md the table of accuracies; of findings/tuning.json the
settings that the package has on its streams, ../minimoe/tuned.json; and what lessons read,
../minimoe/lesson/numbers.json. The commands write such pages beside their results; this one writes
those that are stored here, after a scheme or a result was added. The tests hold the stored pages to
it.
"""

import re
import sys
from pathlib import Path
from typing import Any

from minimoe.bench import page as bench_page
from minimoe.bench import read as read_bench
from minimoe.lesson.numbers import NUMBERS
from minimoe.roster import ROSTER, TUNED, names
from minimoe.studies import STUDIES, answer, stored, tuning
from minimoe.tools.files import read_json, write_atomic, write_json
from minimoe.tools.results import CompareResult, StudyResult
from minimoe.tools.tables import compare_page, findings

sys.path.insert(0, str(Path(__file__).parent))
import schemes_page

HERE = Path(__file__).parent
RESULTS = {  # name: the command that made it, and the pictures that are stored with it
    "compare": ("minimoe compare", ["compare.png", "gates.png"]),
    "permuted": ("minimoe compare --stream permuted-digits", []),
    "planted": ("minimoe compare --stream planted --seeds 0 1 2", []),
}
BENCH = "minimoe bench --repeats 7"


def study_results() -> list[StudyResult]:
    """Those that are stored, in the order of STUDIES."""
    found = [stored(HERE / "findings", name) for name in STUDIES]
    return [result for result in found if result is not None]


def pages() -> dict[Path, str]:
    """{file: what it should hold}."""
    made = {}
    for name, (command, pictures) in RESULTS.items():
        result = CompareResult.read(HERE / "results" / f"{name}.json")
        made[HERE / "results" / f"{name}.md"] = compare_page(result, command, pictures)
    bench = read_bench(HERE / "results" / "bench-cpu.json")
    made[HERE / "results" / "bench-cpu.md"] = bench_page(
        bench, BENCH, "bench-cpu.png", "growth.png"
    )
    made[HERE / "findings" / "findings.md"] = findings(study_results())
    atlas = StudyResult.read(HERE / "findings" / "atlas.json")
    made[HERE / "results" / "schemes.md"] = schemes_page.page(atlas)
    both = [stored(HERE / "findings", name) for name in ("memory", "why")]
    made[HERE / "findings" / "self-activation.md"] = answer.page(*both)
    readme = HERE.parent / "README.md"
    made[readme] = with_table(readme.read_text(encoding="utf-8"))
    return made


def with_table(text: str) -> str:
    """README with its table as it should be."""
    table = f"{accuracies()}\n\n"
    text, n = re.subn(r"^\| final accuracy \|.*?\n\n", lambda _: table, text, flags=re.M | re.S)
    assert n == 1
    return text


def accuracies() -> str:
    """All but the atlas, and of that `alone`, in each place, by findings/atlas.json, without some
    that others stand for; a dash where they cannot live, or have not been run yet."""
    atlas = StudyResult.read(HERE / "findings" / "atlas.json")
    places = list(dict.fromkeys(row.split(", ")[0] for row in atlas.rows))
    heads = [place.split(" under ")[-1].removesuffix("-digits") for place in places]
    lines = [f"| final accuracy | {' | '.join(heads)} |", "|---" * (len(places) + 1) + "|"]
    hidden = ("zero_shot", "class_mean", "lda", "trigram", "head_only", "lora_grown", "replay_80")
    for name in names():
        if name in hidden or (ROSTER[name].kind == "atlas" and name != "alone"):
            continue
        rows = [atlas.rows.get(f"{place}, {name}") for place in places]
        cells = ["–" if row is None else schemes_page.spread(row["acc"]) for row in rows]
        if any(rows):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings() -> dict:
    """What tuned.json should hold."""
    result = stored(HERE / "findings", "tuning")
    if result is None:
        return {"settings": {}}
    return {"command": result.command, "code": result.code, "settings": tuning.chosen(result)}


def lesson_numbers() -> dict[str, Any]:
    """What numbers.json should hold: see `minimoe.lesson.numbers`."""
    atlas: dict[str, Any] = {}
    for place, row in StudyResult.read(HERE / "findings" / "atlas.json").rows.items():
        stream, _, name = place.partition(", ")
        acc = [round(value, 4) for value in row["acc"].values]
        atlas.setdefault(stream, {})[name] = {"acc": acc, "stored": round(row["stored"].mean)}
    planted = {
        name: {
            "acc": round(row.acc.mean, 4),
            "bwt": None if row.bwt.mean is None else round(row.bwt.mean, 4),
            "reachable": round(row.reachable.mean, 4),
            "limit": row.reachable.limit,
        }
        for name, row in CompareResult.read(HERE / "results" / "planted.json").schemes.items()
        if row.reachable
    }
    bench = read_bench(HERE / "results" / "bench-cpu.json")
    parts = ("up-projection", "layer", "beside", "growth", "weight gradient")
    rows = [
        {key: row[key] for key in ("part", "pass", "R", "name", "routing", "peak") if key in row}
        | {key: row[key] and round(row[key]["median"], 4) for key in ("ratio", "ms")}
        for row in bench["rows"]
        if row["part"] in parts
    ]
    sizes = {key: bench[key] for key in ("tokens", "width", "top_k")}
    return {"atlas": atlas, "planted": planted, "bench": sizes | {"rows": rows}}


def main() -> int:
    content = lesson_numbers()
    if not NUMBERS.exists() or read_json(NUMBERS, "lesson", mend="")[1] != content:
        write_json(NUMBERS, "lesson", content)
        print(NUMBERS.relative_to(HERE.parent))
    if read_json(TUNED, "tuned", mend="")[1] != settings():
        write_json(TUNED, "tuned", settings())
        print(TUNED.relative_to(HERE.parent))
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text.encode())
            print(path.relative_to(HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
