"""A graph of standard ONNX operators, written call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

Operand = str | int | float | Sequence[int] | Sequence[float] | np.ndarray

FLOAT, INT, UINT8, BOOL = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.BOOL,
)


class Graph:
    """Nodes and constants as they come.

    An operand is the name of a value, or numbers that become a constant: floating-point ones
    float32, whole ones int64.

    Args:
        opset: Version of the standard operators.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._functions: list[onnx.FunctionProto] = []
        self._ir_version = 8  # of opset 18; a newer one than is needed shuts older runtimes out
        self._count = 0

    def _new(self, kind: str) -> str:
        self._count += 1
        return f'{kind.lower()}_{self._count}'

    def _name(self, operand: Operand) -> str:
        if isinstance(operand, str):
            return operand
        array = np.asarray(operand)
        array = array.astype(np.int64 if array.dtype.kind in 'iu' else np.float32)
        name = self._new('constant')
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, operator: str, *operands: Operand, **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        return self.add_many(operator, 1, *operands, **attributes)[0]

    def add_many(
        self, operator: str, outputs: int, *operands: Operand, **attributes: Any
    ) -> list[str]:
        """A node; the names of its outputs."""
        names = [self._new(operator) for _ in range(outputs)]
        inputs = [self._name(operand) for operand in operands]
        self.nodes.append(helper.make_node(operator, inputs, names, names[0], **attributes))
        return names

    def inline(self, model: ModelProto, prefix: str, inputs: Mapping[str, str]) -> dict[str, str]:
        """Puts all of another model in.

        Args:
            model: With the same opset.
            prefix: For the names in it, which must not meet those that are here.
            inputs: What its inputs are, by name.

        Returns:
            What its outputs are, by name.
        """
        assert [s.version for s in model.opset_import if not s.domain] == [self.opset]
        self._ir_version = max(self._ir_version, model.ir_version)
        model = onnx.compose.add_prefix(model, f'{prefix}/')
        for own, given in inputs.items():
            self.nodes.append(helper.make_node('Identity', [given], [f'{prefix}/{own}']))
        self.nodes += model.graph.node
        self.constants += model.graph.initializer
        self._functions += model.functions
        return {o.name.removeprefix(f'{prefix}/'): o.name for o in model.graph.output}

    def takes(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """An input; a size that is a name is open."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def gives(self, name: str, value: str, kind: int, shape: Sequence[int | str]) -> None:
        """An output."""
        self.nodes.append(helper.make_node('Identity', [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self) -> ModelProto:
        """The whole, checked.

        Raises:
            onnx.checker.ValidationError: something does not fit.
        """
        graph = helper.make_graph(
            self.nodes, 'wsbcn_mm', self._inputs, self._outputs, self.constants
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid('', self.opset)], functions=self._functions
        )
        model.ir_version = self._ir_version
        onnx.checker.check_model(model, full_check=True)
        return model
