"""Where torch computes."""

import torch


def device_is_here(name: str) -> None:
    """Raises ValueError if torch cannot compute there."""
    try:
        device = torch.device(name)
        if device.type in ("cpu", "meta") and (device.type == "meta" or device.index):
            raise RuntimeError(f"there is no {name}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "cpu" + (", cuda" if torch.cuda.is_available() else "")
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, allowed here: {here} ({reason})") from None
