"""LiSSA with planned hyper-parameters (Klochkov & Liu 2024): predicted error, batch sizes, and condition C.1."""
