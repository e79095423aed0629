"""Fusions of ONNX Runtime that fail at a graph leave it as it was."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from converters.targets.onnx.export import fused


def test_a_sigmoid_of_factors_of_its_own_is_no_quick_gelu() -> None:
    """For which it takes any product of two and a sigmoid, and asks for the one factor."""
    factors = np.array([1.702, 0.5, 3.0], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "factors"], ["scaled"]),
            helper.make_node("Sigmoid", ["scaled"], ["gate"]),
            helper.make_node("Mul", ["x", "gate"], ["y"]),
        ],
        "gate",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(factors, "factors")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto = ir.to_proto(fused(ir.from_proto(model)))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x = np.array([[1, -2, 3], [0.5, 4, -1]], dtype=np.float32)
    truth = x / (1 + np.exp(-x * factors))
    assert np.abs(session.run(None, {"x": x})[0] - truth).max() < 1e-6
