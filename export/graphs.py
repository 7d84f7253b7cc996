"""ONNX graphs of a plan: few nodes, in every form."""

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from rfsq.export.graph_builder import GraphBuilder, LinearForm, batched
from rfsq.export.plan import Affine, AffineQuantizer, DecoderPlan, EncoderPlan, action_limit, middle_level
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON

#: exp(2 x) overflows float32 from x = 44.3 on.
_MISH_OVERFLOW = 44.0


class LayerBuilder(GraphBuilder):
    """What the graphs of an autoencoder are made of."""

    def linear(self, value: str, layer: Affine, output: str) -> str:
        """[N, inputs] to [N, outputs]."""
        weight = self.constant(f"{output}.weight", layer.weight)
        bias = self.constant(f"{output}.bias", layer.bias)
        if self.form is not LinearForm.REDUCE:
            return self.apply("Gemm", [value, weight, bias], output, transB=1)
        row = self.reshape(value, (-1, 1, layer.weight.shape[1]), f"{output}.row")
        products = self.apply("Mul", [row, weight], f"{output}.products")
        last = self.constant("last_axis", np.array([2], np.int64))
        sums = self.apply("ReduceSum", [products, last], f"{output}.sums", keepdims=0)
        return self.apply("Add", [sums, bias], output)

    def stack(self, layers: Sequence[str], output: str) -> str:
        """L tensors [N, D, 1] to [N, D, L]."""
        if self.form is not LinearForm.REDUCE or len(layers) == 1:
            return self.apply("Concat", layers, output, axis=-1)
        # Elementwise, so that TensorRT computes the layers and puts them together in one kernel: 12 us instead of 14.
        stacked = layers[-1]
        for layer in range(len(layers) - 2, -1, -1):
            here = self.constant(f"is_L{layer}", np.arange(len(layers)) == layer)
            name = f"{output}.from_L{layer}" if layer else output
            stacked = self.apply("Where", [here, layers[layer], stacked], name)
        return stacked

    def mish(self, value: str, output: str, *, largest: float = math.inf) -> str:
        """x tanh(log(1 + exp x)) as x n / (n + 2) with n = e (e + 2), e = exp x.

        The same function, with less than half the rounding error of softplus and tanh and, on ONNX Runtime, half
        the time: its Softplus is a scalar loop. Beyond x = 20 the fraction is 1 in float32; a cap keeps n finite
        where x may come near `largest`, the most that it can be.
        """
        base = value
        if not largest < _MISH_OVERFLOW:
            base = self.apply("Min", [value, self.scalar("mish.cap", 20.0)], f"{output}.capped")
        power = self.apply("Exp", [base], f"{output}.power")
        two = self.scalar("mish.two", 2.0)
        numerator = self.apply("Mul", [power, self.apply("Add", [power, two], f"{output}.sum")], f"{output}.numerator")
        denominator = self.apply("Add", [numerator, two], f"{output}.denominator")
        gate = self.apply("Div", [numerator, denominator], f"{output}.gate")
        return self.apply("Mul", [value, gate], output)

    def grid(self, levels: str, half_range: float, prefix: str = "") -> str:
        """From levels 0 ... 2 half_range to the grid [-1, 1]."""
        step, one = self.scalar("level_step", 1 / half_range), self.scalar("one", 1.0)
        return self.apply("Sub", [self.apply("Mul", [levels, step], f"{prefix}steps"), one], f"{prefix}grid")


def encoder_graph(plan: EncoderPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """actions float32 [batch, T, A] -> tokens int32 [batch, T, D, L] (and stats float32 [batch, T, L, 2])."""
    build = LayerBuilder(form)
    flat = build.reshape("actions", (-1, plan.action_dim), "steps")
    if form.is_marked:
        # An infinite sum can end as a latent like any other; a NaN reaches every latent of its step.
        flat = build.where_within(flat, action_limit(plan), flat, math.nan, "steps.or_mark")
    if plan.offset.any():
        flat = build.apply("Sub", [flat, build.constant("offset", plan.offset)], "steps.from_offset")
    hidden = build.mish(build.linear(flat, plan.first, "inner"), "hidden")
    latents = build.apply("Tanh", [build.linear(hidden, plan.second, "outer")], "latents")
    columns = build.reshape(latents, (-1, plan.latent_dim, 1), "latents.columns")
    stats: list[str] = []
    if plan.quantizer is not None:
        levels = _affine_layers(build, plan, plan.quantizer, columns)
    else:
        levels, stats = _dynamic_layers(build, plan, columns)
    if form.is_marked:
        # No latent comes near 2: tanh gave them.
        levels = build.where_within(columns, 2.0, levels, -1.0, "levels.or_mark")
    integers = build.apply("Cast", [levels], "tokens.flat", to=TensorProto.INT32)
    build.reshape(integers, (-1, plan.chunk_length, plan.latent_dim, plan.num_layers), "tokens")
    outputs = [batched("tokens", TensorProto.INT32, plan.chunk_length, plan.latent_dim, plan.num_layers)]
    if plan.has_stats:
        pairs = build.apply("Concat", stats, "stats.flat", axis=1)
        build.reshape(pairs, (-1, plan.chunk_length, plan.num_layers, 2), "stats")
        outputs.append(batched("stats", TensorProto.FLOAT, plan.chunk_length, plan.num_layers, 2))
    return build.model("encoder", [batched("actions", TensorProto.FLOAT, plan.chunk_length, plan.action_dim)], outputs)


def decoder_graph(plan: DecoderPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """tokens int32 [batch, T, D, l] (and stats float32 [batch, T, l, 2]) -> actions float32 [batch, T, A]."""
    build = LayerBuilder(form)
    inputs = [batched("tokens", TensorProto.INT32, plan.chunk_length, plan.latent_dim, plan.prefix)]
    numbers = build.apply("Cast", ["tokens"], "levels", to=TensorProto.FLOAT)
    if form.is_marked:
        half_range = (plan.num_levels - 1) / 2
        distance = build.apply("Sub", [numbers, build.scalar("half_range", half_range)], "levels.from_middle")
        numbers = build.where_within(distance, half_range, numbers, math.nan, "levels.or_mark")
    if plan.has_stats:
        inputs.append(batched("stats", TensorProto.FLOAT, plan.chunk_length, plan.prefix, 2))
        flat = _latents_from_stats(build, plan, numbers)
    else:
        flat = build.reshape(numbers, (-1, plan.latent_dim * plan.prefix), "levels.flat")
    hidden = build.mish(build.linear(flat, plan.first, "inner"), "hidden", largest=largest_sum(plan))
    outer = build.linear(hidden, plan.second, "outer")
    if plan.offset.any():
        outer = build.apply("Add", [outer, build.constant("offset", plan.offset)], "outer.with_offset")
    build.reshape(outer, (-1, plan.chunk_length, plan.action_dim), "actions")
    return build.model("decoder", inputs, [batched("actions", TensorProto.FLOAT, plan.chunk_length, plan.action_dim)])


def _affine_layers(build: LayerBuilder, plan: EncoderPlan, quantizer: AffineQuantizer, columns: str) -> str:
    """Levels as floats [N, D, L]."""
    center = middle_level(plan.num_levels)
    bounds = build.scalar("lowest", -center), build.scalar("highest", plan.num_levels - 1 - center)
    remainder, counts = columns, []
    for layer in range(plan.num_layers):
        name = f"L{layer}"
        ratio = build.constant(f"{name}.ratio", quantizer.ratio[layer][:, None])
        shift = build.constant(f"{name}.shift", quantizer.shift[layer][:, None])
        bins = build.apply("Add", [build.apply("Mul", [remainder, ratio], f"{name}.scaled"), shift], f"{name}.bins")
        ceiling = build.apply("Ceil", [bins], f"{name}.ceiling")
        counts.append(build.apply("Clip", [ceiling, *bounds], f"{name}.count"))
        if layer + 1 < plan.num_layers:
            remainder = build.apply("Sub", [bins, counts[-1]], f"{name}.remainder")
    stacked = build.stack(counts, "counts")
    return build.apply("Add", [stacked, build.scalar("middle_level", center)], "levels")


def _dynamic_layers(build: LayerBuilder, plan: EncoderPlan, columns: str) -> tuple[str, list[str]]:
    """Levels as floats [N, D, L], and per layer the statistics [N, 1, 2] when the plan gives them."""
    half_range = (plan.num_levels - 1) / 2
    axis = build.constant("latent_axis", np.array([1], np.int64))
    degrees = build.scalar("degrees_of_freedom", plan.latent_dim - 1)
    epsilon = build.scalar("epsilon", SIGMA_EPSILON)
    scale, shift = build.scalar("half_range", half_range), build.scalar("half_range.less_half", half_range - 0.5)
    bounds = build.scalar("lowest", 0), build.scalar("highest", plan.num_levels - 1)
    residual, levels, stats = columns, [], []
    for layer in range(plan.num_layers):
        name = f"L{layer}"
        mean = build.apply("ReduceMean", [residual, axis], f"{name}.mean", keepdims=1)
        deviation = build.apply("Sub", [residual, mean], f"{name}.deviation")
        squares = build.apply("ReduceSumSquare", [deviation, axis], f"{name}.squares", keepdims=1)
        variance = build.apply("Div", [squares, degrees], f"{name}.variance")
        sigma = build.apply("Add", [build.apply("Sqrt", [variance], f"{name}.root"), epsilon], f"{name}.sigma")
        conditioned = build.apply("Div", [deviation, sigma], f"{name}.conditioned")
        bins = build.apply("Add", [build.apply("Mul", [conditioned, scale], f"{name}.scaled"), shift], f"{name}.bins")
        ceiling = build.apply("Ceil", [bins], f"{name}.ceiling")
        levels.append(build.apply("Clip", [ceiling, *bounds], f"{name}.level"))
        if plan.has_stats:
            stats.append(build.apply("Concat", [mean, sigma], f"{name}.stats", axis=-1))
        if layer + 1 < plan.num_layers:
            grid = build.grid(levels[-1], half_range, f"{name}.")
            # r - (grid sigma + mean), without the mean that the deviation has already lost.
            taken = build.apply("Mul", [grid, sigma], f"{name}.taken")
            residual = build.apply("Sub", [deviation, taken], f"L{layer + 1}.residual")
    return build.stack(levels, "levels"), stats


def _latents_from_stats(build: LayerBuilder, plan: DecoderPlan, numbers: str) -> str:
    """sum over l of grid * sigma + mean: levels [batch, T, D, l] and stats to latents [N, D]."""
    grid = build.grid(numbers, (plan.num_levels - 1) / 2)
    turned = build.apply("Transpose", ["stats"], "stats.turned", perm=[0, 1, 3, 2])
    halves = build.constant("halves", np.array([1, 1], np.int64))
    build.nodes.append(helper.make_node("Split", [turned, halves], ["mean", "sigma"], name="split", axis=2))
    scaled = build.apply("Mul", [grid, "sigma"], "scaled")
    dequantised = build.apply("Add", [scaled, "mean"], "dequantised")
    layer_axis = build.constant("layer_axis", np.array([3], np.int64))
    latents = build.apply("ReduceSum", [dequantised, layer_axis], "latents", keepdims=0)
    return build.reshape(latents, (-1, plan.latent_dim), "latents.flat")


def largest_sum(plan: DecoderPlan) -> float:
    """The most that any sum of the first layer can be for tokens 0 ... K - 1; infinite where it takes latents."""
    if plan.has_stats:
        return math.inf
    weight = plan.first.weight.astype(np.float64)
    return float((weight.clip(min=0).sum(axis=1) * (plan.num_levels - 1) + plan.first.bias).max())
