"""Drop-in forms of other libraries' losses: their constructors and calls, computed by kdfast. docs/drop-in.md has the table.

A module a library, imported by itself (`from kdfast.compat import pml`); none needs the library it stands in for. Arguments that
kdfast does not serve raise a ValueError that names them. Where an original has a defect the adapter does not, and its docstring says so.
"""
