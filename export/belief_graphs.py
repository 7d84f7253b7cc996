"""ONNX graphs that decode probabilities of per-step tokens. Definition: `rfsq_ref/beliefs.py`."""

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rfsq.export.graph_builder import LinearForm, batched
from rfsq.export.graphs import LayerBuilder, largest_sum
from rfsq.export.plan import DecoderPlan

#: Beyond it the derivative of Mish is 1.
_STRAIGHT = 20.0


class _DoubleBuilder(LayerBuilder):
    """All in double, as the processor has it: weights may be large, and a mean is no whole number as a token is."""

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        return super().constant(name, value.astype(np.float64) if value.dtype == np.float32 else value)


def belief_graph(plan: DecoderPlan) -> bytes:
    """probabilities float32 [batch, T, D, l, K] -> actions and std float32 [batch, T, A].

    Distributions are divided by their sum. The mean of the tokens is decoded as tokens are. The variance of what is
    decoded is that of the tokens through the derivative there, as if all behind the mean were straight.
    """
    build = _DoubleBuilder(LinearForm.GEMM)
    mean, variance = _moments(build, plan)
    inner = build.linear(mean, plan.first, "inner")
    outer = build.linear(build.mish(inner, "hidden", largest=largest_sum(plan)), plan.second, "outer")
    if plan.offset.any():
        outer = build.apply("Add", [outer, build.constant("offset", plan.offset)], "outer.with_offset")
    shape = (-1, plan.chunk_length, plan.action_dim)
    deviation = build.apply("Sqrt", [_spread(build, plan, inner, variance)], "deviation")
    for value, output in ((outer, "actions"), (deviation, "std")):
        rounded = build.apply("Cast", [value], f"{output}.flat", to=TensorProto.FLOAT)
        build.reshape(rounded, shape, output)
    sizes = plan.chunk_length, plan.latent_dim, plan.prefix, plan.num_levels
    outputs = [batched(name, TensorProto.FLOAT, *shape[1:]) for name in ("actions", "std")]
    return build.model("belief", [batched("probabilities", TensorProto.FLOAT, *sizes)], outputs)


def _moments(build: LayerBuilder, plan: DecoderPlan) -> tuple[str, str]:
    """Mean and variance of the tokens, [N, D * l]."""
    precise = build.apply("Cast", ["probabilities"], "precise", to=TensorProto.DOUBLE)
    flat = build.reshape(precise, (-1, plan.latent_dim * plan.prefix, plan.num_levels), "flat")
    levels = build.constant("levels", np.arange(plan.num_levels, dtype=np.float32))
    axis = build.constant("level_axis", np.array([2], np.int64))

    def summed(value: str, output: str) -> str:
        return build.apply("ReduceSum", [value, axis], output, keepdims=1)

    total = summed(flat, "total")
    counted = summed(build.apply("Mul", [flat, levels], "mean.products"), "mean.sums")
    mean = build.apply("Div", [counted, total], "mean")
    distance = build.apply("Sub", [levels, mean], "distance")
    squares = build.apply("Mul", [distance, distance], "distance.squares")
    spread = summed(build.apply("Mul", [flat, squares], "variance.products"), "variance.sums")
    variance = build.apply("Div", [spread, total], "variance")
    tail = (-1, plan.latent_dim * plan.prefix)
    return build.reshape(mean, tail, "mean.flat"), build.reshape(variance, tail, "variance.flat")


def _spread(build: LayerBuilder, plan: DecoderPlan, inner: str, variance: str) -> str:
    """Variance of the actions [N, A], of `inner` [N, H] and the variance of the tokens [N, D * l]."""
    assert plan.latents is not None  # with statistics nothing is known of tokens alone
    slope = build.reshape(_mish_slope(build, inner), (-1, 1, len(plan.hidden.bias)), "slope")
    scaled = build.apply("Mul", [slope, build.constant("slope.weight", plan.second.weight)], "slope.scaled")
    # [N, A, D]: how actions follow latents.
    jacobian = build.apply("MatMul", [scaled, build.constant("slope.inner", plan.hidden.weight)], "jacobian")
    if plan.own_tokens is None:
        by_token = build.constant("latents.weight", plan.latents.weight)
        jacobian = build.apply("MatMul", [jacobian, by_token], "jacobian.by_token")
    else:
        own = build.constant("own.squares", np.square(plan.own_tokens.astype(np.float64)).astype(np.float32))
        by_latent = build.reshape(variance, (-1, plan.latent_dim, plan.prefix), "variance.by_latent")
        products = build.apply("Mul", [by_latent, own], "variance.of_tokens")
        variance = build.apply(
            "ReduceSum", [products, build.constant("layer_axis", np.array([2], np.int64))], "latents", keepdims=0
        )
    squares = build.apply("Mul", [jacobian, jacobian], "jacobian.squares")
    width = plan.latent_dim if plan.own_tokens is not None else plan.latent_dim * plan.prefix
    column = build.reshape(variance, (-1, width, 1), "variance.column")
    return build.reshape(build.apply("MatMul", [squares, column], "spread.column"), (-1, plan.action_dim), "spread")


def _mish_slope(build: LayerBuilder, value: str) -> str:
    """The derivative of Mish: g + 4 x e (e + 1) / (n + 2)^2 with e = exp x, n = e (e + 2), g = n / (n + 2).

    tanh(log(1 + e)) = g, and its derivative by x is (1 - g^2) e / (1 + e), where 1 - g^2 = 4 (1 + e)^2 / (n + 2)^2.
    """
    x = build.apply("Min", [value, build.scalar("slope.cap", _STRAIGHT)], "slope.x")
    e, one, two = build.apply("Exp", [x], "slope.e"), build.scalar("slope.one", 1), build.scalar("slope.two", 2)
    n = build.apply("Mul", [e, build.apply("Add", [e, two], "slope.e_2")], "slope.n")
    over = build.apply("Add", [n, two], "slope.n_2")
    gate = build.apply("Div", [n, over], "slope.gate")
    rising = build.apply("Mul", [e, build.apply("Add", [e, one], "slope.e_1")], "slope.rising")
    # One division after the other: the square of the denominator is large.
    share = build.apply("Div", [build.apply("Div", [rising, over], "slope.once"), over], "slope.share")
    four = build.apply("Mul", [x, build.scalar("slope.four", 4)], "slope.4x")
    return build.apply("Add", [gate, build.apply("Mul", [four, share], "slope.more")], "slope.flat")
