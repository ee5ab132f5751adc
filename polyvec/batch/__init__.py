"""Texts to a folder of vectors, on one process or on a cluster, exactly once.

rows     inputs as units that one reader reads in order; rows; slices of rows, named by their content
plan     the slices of a whole input, the texts that several of them share, what is done and what is left
worker   one slice: its distinct texts to vectors, its part and its receipt
trial    texts that end their worker are found and set aside
parts    the table of a part
formats  parts as files of Parquet, or as one Lance dataset
storage  a folder, local or by URL, whose files appear whole
job      what is asked for
engines  the slices on this process or on Ray
run      all of it
"""
