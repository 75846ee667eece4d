"""What `--weights` asks for: the formats among which each stage's is chosen."""

from pathlib import Path

from apportion.catalog.gguf_config import GGUF_SUFFIX, quantisation_note, quantised_format
from apportion.catalog.gguf_file import read_gguf
from apportion.types.cluster import Cluster
from apportion.types.errors import UsageError
from apportion.types.model import ModelSpec
from apportion.types.units import WEIGHT_BITS

AUTO = "auto"


def parse_weights(text: str, own_format: str) -> tuple[str, ...]:
    """ "int8,auto" -> ("bf16", "int8") for a model whose own format is bf16; widest first. Raises UsageError."""
    names = [own_format if name == AUTO else name for name in (part.strip() for part in text.split(","))]
    unknown = [name for name in names if name not in WEIGHT_BITS]
    if unknown:
        raise UsageError(
            f"--weights: '{unknown[0]}' is none of {', '.join(WEIGHT_BITS)} or {AUTO}; join several by commas"
        )
    return tuple(name for name in WEIGHT_BITS if name in names)


def weight_formats(file: Path, model: ModelSpec, cluster: Cluster, text: str | None) -> tuple[str, ...]:
    """`text` is what was typed. Raises UsageError."""
    gguf = read_gguf(file) if file.suffix == GGUF_SUFFIX else None
    quantised = None if gguf is None else quantised_format(gguf)
    if quantised is not None and any(device.rate(quantised) is None for device in cluster.devices):
        quantised = None
    own_format = quantised or _float_format(model, cluster)
    if text is not None:
        return parse_weights(text, own_format)
    if quantised is None and any(device.kind == "cpu" for device in cluster.devices):
        return ("fp32",)
    return (own_format,)


def weights_note(file: Path, formats: tuple[str, ...]) -> str | None:
    """What a GGUF file is planned as, where that is not what it holds."""
    return quantisation_note(read_gguf(file), formats) if file.suffix == GGUF_SUFFIX else None


def _float_format(model: ModelSpec, cluster: Cluster) -> str:
    """Older GPUs have no bf16: the same weights then go in fp16, and only where that lacks a rate in fp32."""
    formats = dict.fromkeys((model.checkpoint_format, "fp16", "fp32"))
    common = (name for name in formats if all(name in device.flops_per_s for device in cluster.devices))
    return next(common, model.checkpoint_format)
