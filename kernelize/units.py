"""How a size is written: alike in every table, card and picture."""


def data_size(count: float) -> str:
    """1.5 MB from 1500000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
