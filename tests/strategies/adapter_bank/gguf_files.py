"""A GGUF file with every weight in fp32, for tests and benchmarks that compare with llama.cpp."""

import numpy


def expanded(file, out):
    """The same model with every weight in fp32: of fewer bits llama.cpp rounds a product's inputs as well."""
    import gguf

    found = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, found.fields["general.architecture"].contents())
    for name, field in found.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            part = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=part)
    for tensor in found.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
