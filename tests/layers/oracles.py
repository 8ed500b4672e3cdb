"""The methods written out from their formulas, index by index, in float64.

Nothing here calls the code under test. Kernels are built in loops over plain numbers; the last step is one
`F.conv2d` without padding, on an input that is padded here by hand.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from .cases import Case, pair

Nested = list[Any]


def numbers(tensor: torch.Tensor) -> Nested:
    """A tensor as nested lists of float64 numbers."""
    return tensor.detach().double().tolist()


def zeros(*shape: int) -> Nested:
    return torch.zeros(shape).tolist()


def tensor(values: Nested, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


# Plain convolution ----------------------------------------------------------------------------------------------------


def pads(case: Case, axis: int) -> tuple[int, int]:
    """How many positions a convolution adds before and after its input along one axis."""
    side, stride, dilation = (pair(value)[axis] for value in (case.kernel_size, case.stride, case.dilation))
    span = dilation * (side - 1)
    length = case.size[axis]
    if case.same:
        total = max((math.ceil(length / stride) - 1) * stride + span + 1 - length, 0)
    elif case.padding == 'same':
        total = span
    elif case.padding == 'valid':
        total = 0
    else:
        return (pair(case.padding)[axis],) * 2
    return total // 2, total - total // 2


def source(position: int, length: int, padding_mode: str) -> int | None:
    """Where the value at a position outside of 0 … length - 1 comes from; None is a zero."""
    if 0 <= position < length:
        return position
    if padding_mode == 'zeros':
        return None
    if padding_mode == 'replicate':
        return 0 if position < 0 else length - 1
    if padding_mode == 'circular':
        return position % length
    return -position if position < 0 else 2 * (length - 1) - position


def pad(x: torch.Tensor, case: Case) -> torch.Tensor:
    """x (B, I, h, w), padded by hand."""
    x = x.double()
    for axis in (0, 1):
        before, after = pads(case, axis)
        slices = []
        for position in range(-before, case.size[axis] + after):
            index = source(position, case.size[axis], case.padding_mode)
            piece = x.select(axis + 2, index or 0)
            slices.append(torch.zeros_like(piece) if index is None else piece)
        x = torch.stack(slices, dim=axis + 2)
    return x


def convolution(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, case: Case) -> torch.Tensor:
    """A plain convolution of x (B, I, h, w) with kernel (O, I/g, kh, kw) and the geometry of the case."""
    bias = None if bias is None else bias.detach().double()
    return F.conv2d(pad(x, case), kernel, bias, case.stride, 0, case.dilation, case.groups)


# DO-Conv --------------------------------------------------------------------------------------------------------------


def do_mix(
    first: Nested, surplus: Nested | None, depthwise: Nested, area: int, depth_multiplier: int, position: int
) -> float:
    """Σ_s (D[m,s] + E[m,s]) · W[s] for one pair of an output and an input channel."""
    blocks = depth_multiplier // area
    total = 0.0
    for s in range(depth_multiplier):
        weight = first[s] if s < area else surplus[s - area]
        identity = 1.0 if s % area == position and s < blocks * area else 0.0
        total += (depthwise[position][s] + identity) * weight
    return total


def do_kernel(
    weight: torch.Tensor,
    depthwise_weight: torch.Tensor | None,
    surplus_weight: torch.Tensor | None,
    groups: int,
) -> torch.Tensor:
    """K[o,i,m] = Σ_s (D[i,m,s] + E[m,s]) · W[o,i,s], where i is the input channel of the whole layer."""
    if depthwise_weight is None:
        return weight.detach().double()
    out_channels, group_inputs, kernel_height, kernel_width = weight.shape
    area, depth_multiplier = kernel_height * kernel_width, depthwise_weight.shape[2]
    first = numbers(weight.reshape(out_channels, group_inputs, area))
    surplus = None if surplus_weight is None else numbers(surplus_weight)
    depthwise = numbers(depthwise_weight)
    kernel = zeros(out_channels, group_inputs, area)
    for o, j, m in itertools.product(range(out_channels), range(group_inputs), range(area)):
        group = o // (out_channels // groups)
        i = group * group_inputs + j
        beyond = None if surplus is None else surplus[o][j]
        kernel[o][j][m] = do_mix(first[o][j], beyond, depthwise[i], area, depth_multiplier, m)
    return tensor(kernel, weight.shape)


def do_transpose_kernel(
    weight: torch.Tensor, depthwise_weight: torch.Tensor | None, surplus_weight: torch.Tensor | None
) -> torch.Tensor:
    """K[i,o,m] = Σ_s (D[i,m,s] + E[m,s]) · W[i,o,s] for a transposed convolution, weight (I, O/g, kh, kw)."""
    if depthwise_weight is None:
        return weight.detach().double()
    in_channels, group_outputs, kernel_height, kernel_width = weight.shape
    area, depth_multiplier = kernel_height * kernel_width, depthwise_weight.shape[2]
    first = numbers(weight.reshape(in_channels, group_outputs, area))
    surplus = None if surplus_weight is None else numbers(surplus_weight)
    depthwise = numbers(depthwise_weight)
    kernel = zeros(in_channels, group_outputs, area)
    for i, o, m in itertools.product(range(in_channels), range(group_outputs), range(area)):
        beyond = None if surplus is None else surplus[i][o]
        kernel[i][o][m] = do_mix(first[i][o], beyond, depthwise[i], area, depth_multiplier, m)
    return tensor(kernel, weight.shape)


# RefConv --------------------------------------------------------------------------------------------------------------


def ref_kernel(weight: torch.Tensor, map_weight: torch.Tensor, groups: int) -> torch.Tensor:
    """K = W + Map(W), where Map sees all 2-D kernels as the channels of one image, in consecutive sets of g channels.

    The same for a transposed convolution: nothing but the order of the 2-D kernels is read.
    """
    kernel_height, kernel_width = weight.shape[2:]
    channels = weight.shape[0] * weight.shape[1]
    map_height, map_width = map_weight.shape[2:]
    assert map_weight.shape[:2] == (channels, groups)
    image = numbers(weight.reshape(channels, kernel_height, kernel_width))
    maps = numbers(map_weight)
    kernel = zeros(channels, kernel_height, kernel_width)
    for c, m, n in itertools.product(range(channels), range(kernel_height), range(kernel_width)):
        total = image[c][m][n]
        first = c // groups * groups
        for r, u, v in itertools.product(range(groups), range(map_height), range(map_width)):
            row, column = m + u - map_height // 2, n + v - map_width // 2
            if 0 <= row < kernel_height and 0 <= column < kernel_width:
                total += maps[c][r][u][v] * image[first + r][row][column]
        kernel[c][m][n] = total
    return tensor(kernel, weight.shape)


# ACNet ----------------------------------------------------------------------------------------------------------------


def in_the_middle(side: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A kernel (O, I/g, kh, 1) or (O, I/g, 1, kw) on the middle column or row of a zero kernel (O, I/g, kh, kw)."""
    kernel = torch.zeros(shape, dtype=torch.float64)
    if side.shape[3] == 1 and side.shape[2] == shape[2]:
        kernel[:, :, :, shape[3] // 2] = side.detach().double()[:, :, :, 0]
    else:
        kernel[:, :, shape[2] // 2, :] = side.detach().double()[:, :, 0, :]
    return kernel


def mean_of(branch: torch.Tensor) -> torch.Tensor:
    """The mean of each channel of (B, O, h, w)."""
    count = branch.shape[0] * branch.shape[2] * branch.shape[3]
    return branch.sum(dim=(0, 2, 3)) / count


def variance_of(branch: torch.Tensor, correction: int = 0) -> torch.Tensor:
    """The variance of each channel of (B, O, h, w)."""
    count = branch.shape[0] * branch.shape[2] * branch.shape[3]
    deviation = branch - mean_of(branch)[:, None, None]
    return (deviation * deviation).sum(dim=(0, 2, 3)) / (count - correction)


def per_channel(vector: torch.Tensor) -> torch.Tensor:
    return vector.detach().double()[:, None, None]


def ac_conv(layer: torch.nn.Module, x: torch.Tensor, case: Case, training: bool) -> torch.Tensor:
    """y = W*x + s_v⊙(W_v*x) + s_h⊙(W_h*x) + b, s = γ/√(v + eps), or γ, each branch a convolution of its own."""
    shape = layer.weight.shape
    y = convolution(x, layer.weight.detach().double(), layer.bias, case)
    for side in ('vertical', 'horizontal'):
        branch = convolution(x, in_the_middle(getattr(layer, f'{side}_weight'), shape), None, case)
        scale = per_channel(getattr(layer, f'{side}_gamma'))
        if layer.branch_norm == 'batch':
            variance = variance_of(branch) if training else getattr(layer, f'{side}_running_var').double()
            scale = scale / torch.sqrt(per_channel(variance) + layer.eps)
        y = y + scale * branch
    return y


def ac_running_var(
    layer: torch.nn.Module, side: str, before: torch.Tensor, x: torch.Tensor, case: Case, momentum: float
) -> torch.Tensor:
    """The running variance after one training step, as BatchNorm2d keeps it: unbiased, momentum on the new value."""
    branch = convolution(x, in_the_middle(getattr(layer, f'{side}_weight'), layer.weight.shape), None, case)
    return (1 - momentum) * before.double() + momentum * variance_of(branch, correction=1)


def ac_plain(layer: torch.nn.Module, x: torch.Tensor, case: Case, scale: float) -> torch.Tensor:
    """y = s·(W*x + W_v*x + W_h*x) + b."""
    shape = layer.weight.shape
    y = convolution(x, layer.weight.detach().double(), None, case)
    y = y + convolution(x, in_the_middle(layer.vertical_weight, shape), None, case)
    y = scale * (y + convolution(x, in_the_middle(layer.horizontal_weight, shape), None, case))
    return y if layer.bias is None else y + per_channel(layer.bias)


def batch_norm(branch: torch.Tensor, norm: torch.nn.BatchNorm2d, training: bool) -> torch.Tensor:
    """γ·(x − μ)/√(v + eps) + β."""
    mean = mean_of(branch) if training else norm.running_mean
    variance = variance_of(branch) if training else norm.running_var
    y = (branch - per_channel(mean)) / torch.sqrt(per_channel(variance) + norm.eps)
    return y if norm.weight is None else per_channel(norm.weight) * y + per_channel(norm.bias)


def ac_block(block: torch.nn.Module, x: torch.Tensor, case: Case, training: bool) -> torch.Tensor:
    """y = BN_s(W*x) + BN_v(W_v*x) + BN_h(W_h*x), and a last norm of the sum where there is one."""
    shape = block.square_conv.weight.shape
    y = batch_norm(convolution(x, block.square_conv.weight.detach().double(), None, case), block.square_bn, training)
    for conv, norm in ((block.ver_conv, block.ver_bn), (block.hor_conv, block.hor_bn)):
        y = y + batch_norm(convolution(x, in_the_middle(conv.weight, shape), None, case), norm, training)
    return y if block.last_bn is None else batch_norm(y, block.last_bn, training)


# Dynamic convolution --------------------------------------------------------------------------------------------------


def temperature_at(start: float, position: int, steps: int) -> float:
    """T = 1 + (start − 1)·max(0, 1 − position/steps)."""
    return 1 + (start - 1) * max(0.0, 1 - position / steps)


def linear(layer: torch.nn.Linear, values: list[float]) -> list[float]:
    weight = numbers(layer.weight)
    bias = [0.0] * len(weight) if layer.bias is None else numbers(layer.bias)
    return [b + sum(w * value for w, value in zip(row, values)) for row, b in zip(weight, bias)]


def attention(layer: torch.nn.Module, x: torch.Tensor, temperature: float) -> list[list[float]]:
    """π(x) = softmax(fc2(relu(fc1(avgpool(x)))) / T) for each sample: B lists of K numbers."""
    result = []
    for sample in numbers(x):
        pooled = [sum(map(sum, rows)) / (len(rows) * len(rows[0])) for rows in sample]
        hidden = [max(value, 0.0) for value in linear(layer.attention.fc1, pooled)]
        logits = [value / temperature for value in linear(layer.attention.fc2, hidden)]
        exponentials = [math.exp(value - max(logits)) for value in logits]
        result.append([value / sum(exponentials) for value in exponentials])
    return result


def stacked(mean: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
    """The K free kernels (or biases) from their mean and K − 1 residuals: W + R_k, and W − Σ R_k as the last."""
    mean, residual = mean.detach().double(), residual.detach().double()
    out_channels = mean.shape[0]
    blocks = [residual[k * out_channels : (k + 1) * out_channels] for k in range(len(residual) // out_channels)]
    return [mean + block for block in blocks] + [mean - sum(blocks)]


def dynamic_kernels(layer: torch.nn.Module, x: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ_k π_k(x_b)·W_k for each sample: (B, O, I/g, kh, kw)."""
    kernels = stacked(layer.weight, layer.residual_weight)
    return torch.stack(
        [
            sum(share * kernel for share, kernel in zip(shares, kernels, strict=True))
            for shares in attention(layer, x, temperature)
        ]
    )


def dynamic_conv(layer: torch.nn.Module, x: torch.Tensor, case: Case, temperature: float) -> torch.Tensor:
    """y_b = (Σ_k π_k(x_b) W_k) * x_b + Σ_k π_k(x_b) b_k for each sample."""
    outputs = []
    kernels = dynamic_kernels(layer, x, temperature)
    for b, shares in enumerate(attention(layer, x, temperature)):
        y = convolution(x[b : b + 1], kernels[b], None, case)
        if layer.bias is not None:
            biases = stacked(layer.bias, layer.residual_bias)
            y = y + per_channel(sum(share * bias for share, bias in zip(shares, biases, strict=True)))
        outputs.append(y)
    return torch.cat(outputs)


# DBB and OREPA --------------------------------------------------------------------------------------------------------


def identity_of(channels: int, group_channels: int) -> torch.Tensor:
    """A 1x1 kernel (channels, I/g) that hands on input channel i mod I/g of the group."""
    eye = torch.zeros(channels, group_channels, dtype=torch.float64)
    for channel in range(channels):
        eye[channel, channel % group_channels] = 1
    return eye


def one_after_the_other(inner: torch.Tensor, outer: torch.Tensor, groups: int) -> torch.Tensor:
    """K[o, i, h, w] = Σ_m outer[o, m, h, w] inner[m of o's group, i], inner (C, I/g), outer (O, C/g, kh, kw)."""
    kernel = torch.zeros(outer.shape[0], inner.shape[1], *outer.shape[2:], dtype=torch.float64)
    for o in range(outer.shape[0]):
        first = o // (outer.shape[0] // groups) * outer.shape[1]
        for m in range(outer.shape[1]):
            for i in range(inner.shape[1]):
                kernel[o, i] += outer[o, m] * inner[first + m, i]
    return kernel


def on_the_middle(point: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A 1x1 kernel in the middle of a zero kernel."""
    kernel = torch.zeros(shape, dtype=torch.float64)
    kernel[:, :, shape[2] // 2, shape[3] // 2] = point[:, :, 0, 0]
    return kernel


def dbb_kernels(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The kernels of DBB's branches, of the stock shape."""
    shape, area = layer.weight.shape, layer.weight[0, 0].numel()
    inner, outer = (getattr(layer, f'{name}_weight').detach().double() for name in ('inner', 'outer'))
    if layer.groups == layer.in_channels == layer.out_channels:
        sequential = one_after_the_other(inner[:, :, 0, 0], outer, layer.groups)
        return {'sequential': sequential, 'mean': torch.full(shape, 1 / area, dtype=torch.float64)}
    inner = inner[:, :, 0, 0] + identity_of(len(inner), shape[1])
    return {
        'point': on_the_middle(layer.point_weight.detach().double(), shape),
        'sequential': one_after_the_other(inner, outer, layer.groups),
        'mean': (layer.mean_weight.detach().double() / area).expand(shape),
    }


def dbb_conv(
    layer: torch.nn.Module, x: torch.Tensor, case: Case, training: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """y = W*x + Σ_k s_k⊙(B_k*x) + b with s = γ/√(v + eps), or γ; and the unbiased variances of the branches."""
    y = convolution(x, layer.weight.detach().double(), layer.bias, case)
    variances = {}
    for name, kernel in dbb_kernels(layer).items():
        branch = convolution(x, kernel, None, case)
        scale = per_channel(getattr(layer, f'{name}_gamma'))
        if layer.branch_norm == 'batch':
            variance = variance_of(branch) if training else getattr(layer, f'{name}_running_var').double()
            scale = scale / torch.sqrt(per_channel(variance) + layer.eps)
            variances[name] = variance_of(branch, correction=1)
        y = y + scale * branch
    return y, variances


def orepa_cosine(channel: int, channels: int, row: int, column: int, sides: tuple[int, int]) -> float:
    """cos(π(h + ½)(i + 1)/kh) in the first half of the channels, cos(π(w + ½)(i + 1 − O/2)/kw) in the second."""
    if channel < channels / 2:
        return math.cos(math.pi * (row + 0.5) * (channel + 1) / sides[0])
    return math.cos(math.pi * (column + 0.5) * (channel + 1 - channels / 2) / sides[1])


def orepa_kernel(layer: torch.nn.Module) -> torch.Tensor:
    """Σ_k γ_k⊙B_k, B_k the stock kernel and the branches."""
    parameters = {name: value.detach().double() for name, value in layer.state_dict().items()}
    weight, groups = parameters['weight'], layer.groups
    shape, area = weight.shape, weight[0, 0].numel()
    kernels = {'weight': weight}
    if area == 1:
        first, second = parameters['first_weight'][:, :, 0, 0], parameters['second_weight']
        kernels['product'] = one_after_the_other(first, second, groups)
    else:
        inner = parameters['inner_weight'][:, :, 0, 0]
        depthwise, pointwise = parameters['depthwise_weight'][:, 0], parameters['pointwise_weight'][:, :, 0, 0]
        kernels['mean'] = (parameters['mean_weight'] / area).expand(shape)
        kernels['prior'] = parameters['prior_weight'] * parameters['prior'][:, None]
        kernels['point'] = on_the_middle(parameters['point_weight'], shape)
        inner = inner + identity_of(len(inner), shape[1])
        kernels['sequential'] = one_after_the_other(inner, parameters['outer_weight'], groups)
        separable = torch.zeros(shape, dtype=torch.float64)
        for o, i, e in itertools.product(range(shape[0]), range(shape[1]), range(8)):
            channel = o // (shape[0] // groups) * shape[1] + i
            separable[o, i] += pointwise[o, 8 * i + e] * depthwise[8 * channel + e]
        kernels['separable'] = separable
    return sum(parameters[f'{name}_gamma'].view(-1, 1, 1, 1) * kernel for name, kernel in kernels.items())


def dbb_block(block: torch.nn.Module, x: torch.Tensor, case: Case, training: bool) -> torch.Tensor:
    """The four branches; a border of what the inner norms make of zero with their running statistics."""
    rows, columns = pair(case.padding)

    def bordered(values: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
        y = batch_norm(values, norm, training)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        edge = per_channel(norm.bias - norm.running_mean * scale)
        result = edge.expand(len(y), -1, y.shape[2] + 2 * rows, y.shape[3] + 2 * columns).clone()
        result[:, :, rows : rows + y.shape[2], columns : columns + y.shape[3]] = y
        return result

    square = block.dbb_origin.conv.weight.detach()
    y = batch_norm(convolution(x, square, None, case), block.dbb_origin.bn, training)
    averaged = F.pad(x, [columns, columns, rows, rows])
    if case.groups < case.out_channels:
        point = on_the_middle(block.dbb_1x1.conv.weight.detach(), square.shape)
        y = y + batch_norm(convolution(x, point, None, case), block.dbb_1x1.bn, training)
        averaged = F.conv2d(x, block.dbb_avg.conv.weight, groups=case.groups)
        averaged = bordered(averaged, block.dbb_avg.bn.bn)
    y = y + batch_norm(F.avg_pool2d(averaged, case.sides, case.stride), block.dbb_avg.avgbn, training)
    first, norm, second, last = block.dbb_1x1_kxk
    kernel = first.weight
    if len(kernel) == case.in_channels:
        kernel = kernel + identity_of(len(kernel), kernel.shape[1])[:, :, None, None]
    inner = bordered(F.conv2d(x, kernel, groups=case.groups), norm.bn)
    outer = F.conv2d(inner, second.weight, None, case.stride, groups=case.groups)
    return y + batch_norm(outer, last, training)
