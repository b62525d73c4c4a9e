"""Krizhevsky's net #145 in NumPy, float64: forward, backward and one update, to test the JAX program against.

It transcribes `layers-145.cfg` and `layer-params-145.cfg` of the 2012 release, and what the release's program makes
of them, and shares no code with the package. Arrays are (image, row, column pixel, map) and convolution kernels
(row, column pixel, input map, output map). In every layer the first half of the maps or units belongs to the
network's column (tower) a, the second half to column b:

    conv1  11x11, stride 4; linear      both columns see the three colors
    rnorm1 across 5 maps, max pool, ReLU    (the normalization sees the signed values)
    conv2  5x5, ReLU                    own column
    rnorm2 across 5 maps, cnorm2 across 5x5 pixels, max pool
    conv3  3x3, ReLU                    both columns
    conv4  3x3, ReLU                    own column
    conv5  3x3, max pool, ReLU          own column
    fc6    ReLU, dropout                both columns
    fc7    ReLU, dropout                both columns
    fc8    softmax                      both columns

A layer that sees both columns is an ordinary layer. Dropout only masks in training; testing halves the outputs.
"""

import numpy as np

CROSS_MAP = {'constant': 2.0, 'scale': 1e-4 / 5}
SPATIAL = {'constant': 1.0, 'scale': 1e-3 / 25}
POWER = 0.75
KEEP = 0.5


def doubles(tree):
    return {name: {kind: np.asarray(leaf, np.float64) for kind, leaf in layer.items()} for name, layer in tree.items()}


def keep_factors(masks):
    """Returns the factors of dropout."""
    return {name: KEEP if masks is None else np.asarray(masks[name], np.float64) for name in ('fc6', 'fc7')}


def taps(size, stride, count):
    """Yields for each pixel of a window its row, its column, and its index in `count` x `count` windows."""
    span = stride * (count - 1) + 1
    for row in range(size):
        for column in range(size):
            yield row, column, np.s_[:, row : row + span : stride, column : column + span : stride]


def halves(array):
    """The parts of columns a and b, along the last axis."""
    return np.split(array, 2, axis=-1)


def join(parts):
    return np.concatenate(parts, axis=-1)


# Convolution. The number of windows is rounded up, so the last windows may contain zeros beyond the edges.


def window_count(length, size, stride, pad):
    return 1 + -(-(length + 2 * pad - size) // stride)


def pad_for(inputs, size, stride, pad):
    length = inputs.shape[1]
    after = (window_count(length, size, stride, pad) - 1) * stride + size - pad - length
    return np.pad(inputs, [(0, 0), (pad, after), (pad, after), (0, 0)])


def convolve(inputs, kernel, stride=1, pad=0):
    size, count = len(kernel), window_count(inputs.shape[1], len(kernel), stride, pad)
    padded = pad_for(inputs, size, stride, pad)
    return sum(padded[tap] @ kernel[row, column] for row, column, tap in taps(size, stride, count))


def convolve_backward(inputs, kernel, gradient, stride=1, pad=0):
    """The gradients with respect to the inputs and the kernel."""
    padded = pad_for(inputs, len(kernel), stride, pad)
    to_padded, to_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for row, column, tap in taps(len(kernel), stride, gradient.shape[1]):
        to_padded[tap] += gradient @ kernel[row, column].T
        to_kernel[row, column] = np.tensordot(padded[tap], gradient, axes=([0, 1, 2], [0, 1, 2]))
    end = pad + inputs.shape[1]
    return to_padded[:, pad:end, pad:end], to_kernel


def convolve_columns(inputs, kernel, pad):
    """Each column's kernels see the maps of their own column."""
    return join([convolve(x, k, pad=pad) for x, k in zip(halves(inputs), halves(kernel), strict=True)])


def convolve_columns_backward(inputs, kernel, gradient, pad):
    parts = zip(halves(inputs), halves(kernel), halves(gradient), strict=True)
    to_inputs, to_kernels = zip(*[convolve_backward(x, k, g, pad=pad) for x, k, g in parts], strict=True)
    return join(to_inputs), join(to_kernels)


# Response normalization: x / (constant + scale * sum of x^2 over the neighbors) ^ 0.75


def sum_maps(values, size=5):
    """The sum over the `size` adjacent maps of the same column, cut off at the column's first and last map."""
    half = size // 2
    sums = []
    for part in halves(values):
        padded = np.pad(part, [(0, 0), (0, 0), (0, 0), (half, half)])
        sums.append(sum(padded[..., i : i + part.shape[-1]] for i in range(size)))
    return join(sums)


def sum_pixels(values, size=5):
    """The sum over the `size` x `size` neighboring pixels of the same map, cut off at the image's edges."""
    half = size // 2
    padded = np.pad(values, [(0, 0), (half, half), (half, half), (0, 0)])
    return sum(padded[tap] for _, _, tap in taps(size, 1, values.shape[1]))


def normalize(inputs, sum_neighbors, constant, scale):
    return inputs * (constant + scale * sum_neighbors(inputs**2)) ** -POWER


def normalize_backward(inputs, gradient, sum_neighbors, constant, scale):
    """The neighbor relation is symmetric, so the same sum collects the gradients of the outputs of all neighbors."""
    base = constant + scale * sum_neighbors(inputs**2)
    through_base = sum_neighbors(gradient * inputs * base ** -(POWER + 1))
    return gradient * base**-POWER - 2 * scale * POWER * inputs * through_base


# Max pooling, 3x3 with stride 2, without partial windows.


def pool(inputs, size=3, stride=2):
    """Returns the maxima, and for each the index of its (first) position in the window."""
    count = (inputs.shape[1] - size) // stride + 1
    values = np.stack([inputs[tap] for _, _, tap in taps(size, stride, count)])
    return values.max(axis=0), values.argmax(axis=0)


def pool_backward(inputs, winners, gradient, size=3, stride=2):
    to_inputs = np.zeros_like(inputs)
    for place, (_, _, tap) in enumerate(taps(size, stride, gradient.shape[1])):
        to_inputs[tap] += gradient * (winners == place)
    return to_inputs


def relu(values):
    return np.maximum(values, 0.0)


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def forward(params, images, masks=None):
    """Returns the logits, and the outputs of all layers by name.

    `masks` has the dropout masks of 'fc6' and 'fc7'; None is for testing. `conv*` and `fc*` are before the ReLU;
    `pool1_winners` and similar names are the positions of the maxima.
    """
    params, keep = doubles(params), keep_factors(masks)
    kernel = {name: layer['kernel'] for name, layer in params.items()}
    bias = {name: layer['bias'] for name, layer in params.items()}
    c = {'images': np.asarray(images, np.float64)}

    c['conv1'] = convolve(c['images'], kernel['conv1'], stride=4) + bias['conv1']
    c['rnorm1'] = normalize(c['conv1'], sum_maps, **CROSS_MAP)
    c['pool1'], c['pool1_winners'] = pool(c['rnorm1'])
    c['relu1'] = relu(c['pool1'])

    c['conv2'] = convolve_columns(c['relu1'], kernel['conv2'], pad=2) + bias['conv2']
    c['relu2'] = relu(c['conv2'])
    c['rnorm2'] = normalize(c['relu2'], sum_maps, **CROSS_MAP)
    c['cnorm2'] = normalize(c['rnorm2'], sum_pixels, **SPATIAL)
    c['pool2'], c['pool2_winners'] = pool(c['cnorm2'])

    c['conv3'] = convolve(c['pool2'], kernel['conv3'], pad=1) + bias['conv3']
    c['relu3'] = relu(c['conv3'])

    c['conv4'] = convolve_columns(c['relu3'], kernel['conv4'], pad=1) + bias['conv4']
    c['relu4'] = relu(c['conv4'])

    c['conv5'] = convolve_columns(c['relu4'], kernel['conv5'], pad=1) + bias['conv5']
    c['pool5'], c['pool5_winners'] = pool(c['conv5'])
    c['relu5'] = relu(c['pool5'])
    c['flat'] = c['relu5'].reshape(len(c['relu5']), -1)

    c['fc6'] = c['flat'] @ kernel['fc6'] + bias['fc6']
    c['relu6'] = relu(c['fc6'])
    c['dropout6'] = c['relu6'] * keep['fc6']

    c['fc7'] = c['dropout6'] @ kernel['fc7'] + bias['fc7']
    c['relu7'] = relu(c['fc7'])
    c['dropout7'] = c['relu7'] * keep['fc7']

    c['fc8'] = c['dropout7'] @ kernel['fc8'] + bias['fc8']
    return c['fc8'], c


def gradients(params, images, labels, masks):
    """Returns the mean cost of the batch, and its gradients by all parameters (without weight decay)."""
    kernel, keep = {name: layer['kernel'] for name, layer in doubles(params).items()}, keep_factors(masks)
    logits, c = forward(params, images, masks)
    rows, labels = np.arange(len(logits)), np.asarray(labels)
    log_probs = log_softmax(logits)
    loss = -log_probs[rows, labels].mean()

    # `g` is the gradient with respect to the output of the layer named last.
    to = {}
    g = np.exp(log_probs)
    g[rows, labels] -= 1
    g /= len(logits)

    to['fc8'] = {'kernel': c['dropout7'].T @ g, 'bias': g.sum(axis=0)}
    g = g @ kernel['fc8'].T

    g = g * keep['fc7'] * (c['fc7'] > 0)
    to['fc7'] = {'kernel': c['dropout6'].T @ g, 'bias': g.sum(axis=0)}
    g = g @ kernel['fc7'].T

    g = g * keep['fc6'] * (c['fc6'] > 0)
    to['fc6'] = {'kernel': c['flat'].T @ g, 'bias': g.sum(axis=0)}
    g = (g @ kernel['fc6'].T).reshape(c['relu5'].shape)

    g = pool_backward(c['conv5'], c['pool5_winners'], g * (c['pool5'] > 0))
    to['conv5'] = {'bias': g.sum(axis=(0, 1, 2))}
    g, to['conv5']['kernel'] = convolve_columns_backward(c['relu4'], kernel['conv5'], g, pad=1)

    g = g * (c['conv4'] > 0)
    to['conv4'] = {'bias': g.sum(axis=(0, 1, 2))}
    g, to['conv4']['kernel'] = convolve_columns_backward(c['relu3'], kernel['conv4'], g, pad=1)

    g = g * (c['conv3'] > 0)
    to['conv3'] = {'bias': g.sum(axis=(0, 1, 2))}
    g, to['conv3']['kernel'] = convolve_backward(c['pool2'], kernel['conv3'], g, pad=1)

    g = pool_backward(c['cnorm2'], c['pool2_winners'], g)
    g = normalize_backward(c['rnorm2'], g, sum_pixels, **SPATIAL)
    g = normalize_backward(c['relu2'], g, sum_maps, **CROSS_MAP)
    g = g * (c['conv2'] > 0)
    to['conv2'] = {'bias': g.sum(axis=(0, 1, 2))}
    g, to['conv2']['kernel'] = convolve_columns_backward(c['relu1'], kernel['conv2'], g, pad=2)

    g = pool_backward(c['rnorm1'], c['pool1_winners'], g * (c['pool1'] > 0))
    g = normalize_backward(c['conv1'], g, sum_maps, **CROSS_MAP)
    to['conv1'] = {'bias': g.sum(axis=(0, 1, 2))}
    _, to['conv1']['kernel'] = convolve_backward(c['images'], kernel['conv1'], g, stride=4)
    return loss, to


def update(params, increments, gradients, rates, *, momentum=0.9, weight_decay=5e-4):
    """Returns the next parameters and increments without changing the arguments."""
    params, increments, gradients = doubles(params), doubles(increments), doubles(gradients)
    new_params, new_increments = {}, {}
    for name, layer in params.items():
        new_params[name], new_increments[name] = {}, {}
        for kind, value in layer.items():
            rate = float(rates[name][kind])
            if rate == 0:  # Weights::update does nothing then
                new_params[name][kind], new_increments[name][kind] = value, increments[name][kind]
                continue
            increment = momentum * increments[name][kind] - rate * gradients[name][kind]
            if kind == 'kernel':
                increment = increment - rate * weight_decay * value
            new_params[name][kind], new_increments[name][kind] = value + increment, increment
    return new_params, new_increments
