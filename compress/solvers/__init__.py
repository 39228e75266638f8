"""The mathematics that passes share: arrays in, arrays out, no tensors' names and no files."""
