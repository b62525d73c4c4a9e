"""The paper's network as users of TensorFlow and PyTorch would write it for speed, to be timed beside the project."""

import importlib.util
from collections.abc import Callable
from typing import Any

RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4

Passes = dict[str, Callable[[], float]]  # each runs one pass to completion and returns a finite number


def is_available(package: str, platform: str) -> bool:
    """Returns whether 'tensorflow' or 'torch' is installed and, for 'gpu', finds a GPU. Returns False for 'tpu'."""
    if platform == 'tpu' or importlib.util.find_spec(package) is None:
        return False
    if platform == 'cpu':
        return True
    if package == 'torch':
        import torch

        return torch.cuda.is_available()
    import tensorflow as tf

    return bool(tf.config.list_physical_devices('GPU'))


def tensorflow_passes(batch_size: int, dtype: str = 'float32', precision: str = 'default') -> Passes:
    """The network in TensorFlow: oneDNN or cuDNN, NHWC, tf.function, tf.nn's LRN, groups as split convolutions.

    Args:
      dtype: the dtype of convolutions, matrix products and activations. Parameters and loss are float32.
      precision: 'float32' forbids TF32 on GPUs.
    """
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(precision != 'float32')
    shapes: list[tuple[int, ...]]
    shapes = [(11, 11, 3, 96), (5, 5, 48, 256), (3, 3, 256, 384), (3, 3, 192, 384), (3, 3, 192, 256)]
    shapes += [(9216, 4096), (4096, 4096), (4096, 1000)]
    kernels = [tf.Variable(tf.random.normal(shape, stddev=0.01)) for shape in shapes]
    biases = [tf.Variable(tf.fill([shape[-1]], 0.1)) for shape in shapes]
    variables = kernels + biases
    velocities = [tf.Variable(tf.zeros_like(variable)) for variable in variables]
    images = tf.cast(tf.random.normal((batch_size, 224, 224, 3)), dtype)
    labels = tf.random.uniform((batch_size,), 0, 1000, tf.int32)

    def convolution(x, layer, stride, padding):
        kernel, bias = tf.cast(kernels[layer], dtype), tf.cast(biases[layer], dtype)
        x = tf.pad(x, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
        groups = x.shape[-1] // kernel.shape[2]
        pairs = zip(tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True)
        parts = [tf.nn.conv2d(part, part_kernel, stride, 'VALID') for part, part_kernel in pairs]
        return tf.nn.relu(tf.concat(parts, -1) + bias)

    def response_norm(x):  # the GPU kernel supports float32 only
        return tf.cast(tf.nn.local_response_normalization(tf.cast(x, tf.float32), 2, 2.0, 1e-4, 0.75), dtype)

    def pool(x):
        return tf.nn.max_pool2d(x, 3, 2, 'VALID')

    def logits(dropout):
        x = pool(response_norm(convolution(images, 0, 4, 2)))
        x = pool(response_norm(convolution(x, 1, 1, 2)))
        for layer in (2, 3, 4):
            x = convolution(x, layer, 1, 1)
        x = tf.reshape(pool(x), [batch_size, -1])
        for layer in (5, 6):
            x = tf.nn.relu(x @ tf.cast(kernels[layer], dtype) + tf.cast(biases[layer], dtype))
            x = tf.nn.dropout(x, 0.5) if dropout else x
        return tf.cast(x @ tf.cast(kernels[7], dtype) + tf.cast(biases[7], dtype), tf.float32)

    @tf.function
    def train_step():
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(dropout=True))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, variables)
        for variable, gradient, velocity in zip(variables, gradients, velocities, strict=True):
            velocity.assign(MOMENTUM * velocity - RATE * (gradient + DECAY * variable))
            variable.assign_add(velocity)
        return loss

    forward = tf.function(lambda: tf.reduce_sum(logits(dropout=False)))
    return {'train': lambda: float(train_step()), 'forward': lambda: float(forward())}


def torch_passes(batch_size: int, dtype: str = 'float32', device: str = 'cpu', precision: str = 'default') -> Passes:
    """The network in PyTorch: torch.compile, channels_last, LRN as shifted adds, SGD with foreach=True.

    Args:
      dtype: float32 or, by autocast, bfloat16.
      device: cpu or cuda.
      precision: 'float32' forbids TF32; 'default' allows it, as JAX and TensorFlow do.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class LocalResponseNorm(nn.Module):
        def forward(self, x):
            channels = x.shape[1]
            squares = functional.pad(x * x, (0, 0, 0, 0, 2, 2))
            root = torch.rsqrt(2.0 + 1e-4 * sum(squares[:, i : i + channels] for i in range(5)))
            return x * (root * torch.sqrt(root))  # (...) ** -0.75

    if device == 'cuda':
        torch.set_float32_matmul_precision('highest' if precision == 'float32' else 'high')
        torch.backends.cudnn.allow_tf32 = precision != 'float32'
        torch.backends.cudnn.benchmark = True
    network: Any = nn.Sequential(
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), LocalResponseNorm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, 1, 2, groups=2), nn.ReLU(), LocalResponseNorm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, 1, 1, groups=2), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(4096, 1000),
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)
    images = torch.randn(batch_size, 3, 224, 224).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    compiled = torch.compile(network)
    cast = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')

    def train() -> float:
        network.train()
        optimizer.zero_grad()
        with cast:
            loss = functional.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def forward() -> float:
        network.eval()
        with torch.no_grad(), cast:
            return compiled(images).sum().item()

    return {'train': train, 'forward': forward}


def tensorflow_product(size: int, dtype: str) -> Callable[[], float]:
    """Returns a function that multiplies two `size` x `size` matrices."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.normal((size, size)), dtype)
    product = tf.function(lambda: tf.matmul(matrix, matrix))
    return lambda: float(product()[0, 0])


def torch_product(size: int, dtype: str, device: str) -> Callable[[], float]:
    """Returns a function that multiplies two `size` x `size` matrices."""
    import torch

    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    return lambda: (matrix @ matrix)[0, 0].item()
