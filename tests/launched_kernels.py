"""Which of kdfast's Triton functions are kernels, that is launched; and, as a pytest plugin (-p launched_kernels), for which GPUs the
tests of object code compile them: those tests run with nothing compiled, and the last line of output says so as JSON."""

import ast
import json
from pathlib import Path

import kdfast

PACKAGE = Path(kdfast.__file__).parent


def kernels() -> set[str]:
    """module.name of the functions under @triton.jit that no other of them calls."""
    functions, imported = {}, {}
    for path in PACKAGE.rglob("*.py"):
        module = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                functions[".".join((*module, node.name))] = node
            if isinstance(node, ast.ImportFrom) and node.module:
                source = (*(module[: -node.level] if node.level else ()), node.module)
                imported |= {(*module, alias.asname or alias.name): ".".join((*source, alias.name)) for alias in node.names}
    called = set()
    for name, node in functions.items():
        module = name.split(".")[:-1]
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                called.add(imported.get((*module, call.func.id), ".".join((*module, call.func.id))))
    return set(functions) - called


def name_of(kernel) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


COMPILED: set[tuple[str, int | str]] = set()


class Recorded:
    """In place of triton_code.Code: what it would have compiled, with nothing to find fault with."""

    registers, stack, local, shared, text = 32, 0, 0, 0, ""

    def __init__(self, kernel, arch, *_args, **_pointers):
        COMPILED.add((name_of(kernel), arch))

    def has(self, instruction: str) -> bool:
        return instruction != "LDL"


def pytest_configure(config):
    import triton_code

    triton_code.Code = Recorded


def pytest_unconfigure(config):
    print(json.dumps(sorted(COMPILED, key=str)))
