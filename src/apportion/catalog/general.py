"""Any model, whatever its family: from the tensors of its files, else as transformers' classes build it, else from the
fields of its config. What is not certain stands in the spec's notes."""

import re
from collections.abc import Sequence
from dataclasses import replace

from apportion.catalog.checkpoint import checkpoint_format
from apportion.catalog.checkpoint_stored import PACKED
from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.facts import Facts, read_facts
from apportion.catalog.field_tensors import tensors_of_fields
from apportion.catalog.gguf_file import Gguf
from apportion.catalog.gguf_stored import FLOAT_TYPES, stored_name
from apportion.catalog.layout import Layout, lay_out
from apportion.catalog.quantisation import Quantisation
from apportion.catalog.safetensors_header import TensorHeader
from apportion.catalog.stored import with_stored
from apportion.catalog.tensor_bytes import sorted_bytes
from apportion.catalog.tensor_roles import NamedTensor, sort_tensors
from apportion.catalog.transformers_child import Described, ask_transformers
from apportion.types.model import ModelSpec

_BESIDE_MATRICES = re.compile(
    r".*(?:scales?|zeros|scale_inv|_scale_2|zero_point|absmax|g_idx|_shape|svh|suh|SCB|biases|quant_map|nested_\w+|bitsandbytes__\w+)$"
)


def general_spec(
    fields: ConfigFields,
    text: ConfigFields,
    name: str,
    family: str,
    float_format: str,
    headers: Sequence[TensorHeader] | None,
    quantisation: Quantisation | None,
) -> ModelSpec:
    """`fields` is the whole config, `text` the language model's part of it. Raises ModelError."""
    source = str(fields.file)
    if headers is not None and quantisation is None:
        named = [_named(header, None) for header in headers]
        return lay_out(name, family, named, read_facts(text), checkpoint_format(headers), source).spec
    layout = _without_files(fields, text, name, family, float_format)
    if quantisation is None:
        return layout.spec
    found = layout.sorted
    if headers is not None:
        found = sort_tensors([_named(header, quantisation) for header in headers], layout.spec.num_layers)
    return with_stored(layout.spec, quantisation.name, "safetensors", sorted_bytes(found, quantisation))


def _without_files(
    fields: ConfigFields, text: ConfigFields, name: str, family: str, float_format: str
) -> Layout:
    source, asked = str(fields.file), ask_transformers(fields, fields.all())
    if isinstance(asked, Described):
        known = {key: value for key, value in asked.config.all().items() if value is not None}
        facts = read_facts(ConfigFields(fields.file, text.all() | known, {}))
        return lay_out(name, family, asked.tensors, facts, float_format, source)
    return by_fields(text, name, family, float_format, asked)


def by_fields(text: ConfigFields, name: str, family: str, float_format: str, reason: str) -> Layout:
    """Raises ModelError."""
    facts = read_facts(text)
    layout = lay_out(name, family, tensors_of_fields(text, facts), facts, float_format, str(text.file))
    note = f"sizes are by the config's fields, as if layers were of the common form: {reason}"
    return replace(layout, spec=replace(layout.spec, notes=(note, *layout.spec.notes)))


def with_named_parts(spec: ModelSpec, fields: ConfigFields, quantisation: Quantisation) -> ModelSpec:
    """The bytes of a known family's modules by their names. Raises ModelError."""
    found = sort_tensors(tensors_of_fields(fields, read_facts(fields)), spec.num_layers)
    return with_stored(spec, quantisation.name, "safetensors", sorted_bytes(found, quantisation))


def general_gguf(gguf: Gguf, fields: ConfigFields, architecture: str, float_format: str) -> ModelSpec:
    """Raises ModelError."""
    named = [
        NamedTensor(
            name=name, shape=tensor.shape[::-1], elements=tensor.num_elements, num_bytes=tensor.num_bytes
        )
        for name, tensor in gguf.tensors.items()
        if not name.startswith("rope_")
    ]
    facts: Facts = read_facts(fields)
    layout = lay_out(gguf.path.stem, architecture, named, facts, float_format, str(gguf.path))
    quantised = [tensor for tensor in gguf.tensors.values() if tensor.type_name not in FLOAT_TYPES]
    if not quantised:
        return layout.spec
    return with_stored(
        layout.spec, stored_name(gguf), "gguf", sorted_bytes(layout.sorted, Quantisation(name="", bits=8))
    )


def _named(header: TensorHeader, quantisation: Quantisation | None) -> NamedTensor:
    elements = header.num_elements
    if quantisation is not None:
        if _BESIDE_MATRICES.fullmatch(header.name):
            elements = 0
        elif header.dtype in PACKED:
            method = quantisation.of(re.sub(r"\.[^.]+$", "", header.name)) or quantisation
            elements = header.num_bytes * 8 // method.bits
    return NamedTensor(name=header.name, shape=header.shape, elements=elements, num_bytes=header.num_bytes)
