"""Token data sets: collections of images as a tokenizer's indices, encoded (`encoding`, `shards`) and decoded (`decoding`).

The format, and the source for those who train on it, are in `kvq.data`, which needs no keras.
"""
