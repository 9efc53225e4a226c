"""The benchmark: every rule on every stream, against the limit. `normadapt bench` runs it.

Suites give tasks, a task gives domains, `streams` draws the order of their instances, `methods` are the rows of the
table, `runner` feeds the one to the other and keeps a bit per instance, and all results are functions of those bits.
"""
