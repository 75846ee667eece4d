"""Writes the picture as SVG, or as PNG by resvg (the extra `apportion[plot]`)."""

from importlib.util import find_spec
from pathlib import Path

from apportion.plot.picture import plan_svg
from apportion.types.errors import UsageError
from apportion.types.files import check_writable, write_file
from apportion.types.plan import Plan

SUFFIXES = (".svg", ".png")
PNG_ZOOM = 2
"""Pixels of the PNG for one of the drawing, so that small letters stay sharp."""


def check_picture_path(path: Path) -> None:
    """Raises UsageError where `write_picture` could not write this kind of file; worth asking before planning."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path} ends in neither {' nor '.join(SUFFIXES)}")
    if path.suffix.lower() == ".png" and find_spec("resvg_py") is None:
        raise UsageError(
            f"--plot {path}: PNG needs resvg; pip install resvg_py, or name a file that ends in .svg"
        )
    check_writable(path, "--plot")


def write_picture(plan: Plan, path: Path) -> None:
    """Raises UsageError for another suffix, without resvg for a PNG, or where the file cannot be written."""
    check_picture_path(path)
    svg = plan_svg(plan)
    content = svg.encode() if path.suffix.lower() == ".svg" else png_bytes(svg)
    write_file(path, content, "--plot")


def png_bytes(svg: str) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=PNG_ZOOM))
