"""The laws as tests of a project's own schemes, for pytest:

from minimoe.laws.testing import laws_of
from my_project import MyScheme, Other

test_laws = laws_of(MyScheme, Other)
"""

from typing import Any

from ..adapter import Adapter
from .check import hold
from .laws import LAWS, Law


def laws_of(*schemes: type[Adapter], **settings: Any) -> Any:
    """A test function, parametrised: a test for each scheme and law, such as
    test_laws[MyScheme-simplex].

    A law that a scheme does not claim is skipped, and says so. (Which are claimed is known once a
    layer is built; a scheme that cannot be built shall fail its tests, and not all of the file's.)
    settings: as of `check`. Raises TypeError on what is no scheme.
    """
    import pytest

    for scheme in schemes:
        if not (isinstance(scheme, type) and issubclass(scheme, Adapter)):
            raise TypeError(f"scheme is {scheme!r}, allowed: a subclass of minimoe.Adapter")
    every = [
        pytest.param(scheme, law, id=f"{scheme.__name__}-{law.__name__}")
        for scheme in schemes
        for law in LAWS
    ]

    @pytest.mark.parametrize(("scheme", "law"), every)
    def test_laws(scheme: type[Adapter], law: Law) -> None:
        row = hold(law, scheme, **settings)
        if row.verdict == "not claimed":
            pytest.skip(f"{scheme.__name__} does not claim {law.__name__}")
        if row.verdict == "broken":
            pytest.fail(f"{scheme.__name__} breaks {row.law}: {row.evidence}", pytrace=False)

    return test_laws
