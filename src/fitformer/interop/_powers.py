"""The rates of sinusoidal codes as constants of an exported program.

They are powers of 10,000. Another library's differ from torch's in the last digit, and what a denoiser multiplies by
them is a noise level of up to 1000: its answers would differ by 1e-4.
"""

from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.node import Node, map_arg

POWER = torch.ops.aten.pow.Scalar


def fold_powers(program: torch.export.ExportedProgram) -> None:
    """Compute, in place, the powers that depend on no input of the program."""
    graph, specs = program.graph_module.graph, program.graph_signature.input_specs
    place = next(k for k, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT)
    first = [node for node in graph.nodes if node.op == "placeholder"][place]
    for node in [node for node in graph.nodes if node.target is POWER and _is_constant(node)]:
        with graph.inserting_before(first):
            constant = graph.placeholder(f"c_{node.name}")
        constant.meta.update(node.meta)
        program.constants[constant.name] = _value(node)
        argument = TensorArgument(name=constant.name)
        specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, argument, constant.name, None))
        place += 1
        node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _is_constant(node: Node) -> bool:
    """Whether a tensor of a known shape depends on no input."""
    if node.op != "call_function" or not all(isinstance(size, int) for size in node.meta["val"].shape):
        return False
    return all(map(_is_constant, node.all_input_nodes))


def _value(node: Any) -> Any:
    return node.target(*map_arg(node.args, _value), **map_arg(node.kwargs, _value))
