"""Experiment records: one YAML file a run, shared by a person and the program.

`file` the two halves and the line between, `ids` their names, `schema` the program's half, `capture` what a run was
made of, `lifecycle` the one place that opens and closes a record, `find` which record to build on.
"""
