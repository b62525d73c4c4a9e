# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # AlexNet in JAX
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/alexnet_jax/blob/main/docs/notebook.ipynb)
#
# This notebook loads a trained network, predicts pictures, looks into the network, and fine-tunes it on new classes. It
# takes a few minutes on two cores and downloads no data.

# %%
import subprocess
import sys

try:
    import alexnet_jax
except ImportError:
    source = 'git+https://github.com/OWNER/alexnet_jax'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', source], check=True)
    import alexnet_jax
print(alexnet_jax.__version__)

# %% [markdown]
# ## Load
#
# `runs/quickstart` is the network of the quickstart: the paper's network at a quarter of its width, which tells from
# which of 16 photographs a patch comes. If you have not trained it, the next cell trains it for a short time. `load()`
# also reads files, such as torchvision's `alexnet.pth`.


# %%
def alexnet(*arguments):
    """Runs a command, as `alexnet train ...` in a terminal, and prints the end of its log."""
    done = subprocess.run([sys.executable, '-m', 'alexnet_jax', *arguments], capture_output=True, text=True)
    print(done.stdout[-1500:] if done.returncode == 0 else done.stderr[-3000:])
    done.check_returncode()


# %%
from pathlib import Path

if not Path('runs/quickstart').exists():
    alexnet('train', '--config=quickstart', '--config.train.steps=400', '--workdir=runs/quickstart')
network = alexnet_jax.load('runs/quickstart')
network

# %% [markdown]
# ## Predict
#
# The photographs are those of scikit-image. A picture may be a path, a Pillow image or a NumPy array.

# %%
import matplotlib.pyplot as plt
import numpy as np
from skimage import data

photographs = {'chelsea': data.chelsea(), 'coffee': data.coffee(), 'rocket': data.rocket()}
patches = {name: photograph[100:260, 150:310] for name, photograph in photographs.items()}
predicted = network.predict(list(patches.values()), top=3)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.5))
for axis, (name, patch), classes in zip(axes, patches.items(), predicted, strict=True):
    axis.imshow(patch)
    axis.set_title(name)
    axis.set_xlabel('\n'.join(f'{each["probability"]:.0%} {each["class"]}' for each in classes))
    axis.set_xticks([])
    axis.set_yticks([])
figure.tight_layout()

# %% [markdown]
# ## The kernels of the first layer
#
# `module` is the Flax NNX module. The first half of the kernels is of the first tower, as in figure 3 of the paper.

# %%
kernels = np.asarray(network.module.conv1.kernel[...])  # (11, 11, 3, kernels)
low, high = kernels.min((0, 1, 2)), kernels.max((0, 1, 2))
shown = np.moveaxis((kernels - low) / (high - low), -1, 0)

figure, axes = plt.subplots(2, len(shown) // 2, figsize=(10, 2))
for axis, kernel in zip(axes.flat, shown, strict=True):
    axis.imshow(kernel)
    axis.axis('off')

# %% [markdown]
# ## Activations
#
# One forward pass gives the outputs of several layers. The distances of the features in fc7 say how similar pictures are
# for the network.

# %%
images = network.images(list(patches.values()))
outputs = network.activations(images, layers=('conv1', 'conv5', 'fc7'))
print({layer: values.shape for layer, values in outputs.items()})
distances = np.linalg.norm(outputs['fc7'][:, None] - outputs['fc7'][None], axis=-1)
print(distances.round(1))

figure, axes = plt.subplots(1, 6, figsize=(10, 2))
for axis, channel in zip(axes, outputs['conv1'][0].var((0, 1)).argsort()[::-1], strict=False):
    axis.imshow(outputs['conv1'][0, :, :, channel], cmap='gray')
    axis.set_title(f'conv1, map {channel}', fontsize=8)
    axis.axis('off')

# %% [markdown]
# ## Saliency
#
# The gradient of a logit with respect to the pixels shows which of them the prediction depends on most (Simonyan,
# Vedaldi, Zisserman 2014, "Deep Inside Convolutional Networks").

# %%
import jax
import jax.numpy as jnp

inputs = network.preprocess(patches['chelsea'])
label = int(network.module(inputs)[0].argmax())
gradient = jax.jit(jax.grad(lambda x: network.module(x)[0, label]))(inputs)
saliency = np.asarray(jnp.abs(gradient).max(-1)[0])

figure, axes = plt.subplots(1, 2, figsize=(6, 3))
axes[0].imshow(network.images(patches['chelsea'])[0])
axes[1].imshow(saliency, cmap='inferno')
axes[1].set_title(network.class_names[label], fontsize=8)
for axis in axes:
    axis.axis('off')

# %% [markdown]
# ## Fine-tuning
#
# The new task has three classes of 40 pictures each: disks, squares and triangles before a noisy background. `--init`
# takes the weights of the quickstart; only the last layer, fc8, is new. For your own pictures, give their folder as
# `folder:DIR`, with one folder per class.

# %%
from PIL import Image
from skimage import draw

random = np.random.default_rng(0)


def picture(shape):
    """Returns uint8 (72, 72, 3) with the shape at a random place, in a random color."""
    size, (row, column) = random.integers(14, 22), random.integers(24, 48, 2)
    corners = {'disk': 32, 'square': 4, 'triangle': 3}[shape]
    angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
    inside = draw.polygon2mask((72, 72), np.stack([row + size * np.sin(angles), column + size * np.cos(angles)], -1))
    bright, dark = random.uniform(150, 255, 3), random.uniform(0, 100, 3)
    values = np.where(inside[..., None], bright, dark) + random.normal(0, 10, (72, 72, 3))
    return values.clip(0, 255).astype(np.uint8)


for split, count in {'train': 40, 'validation': 20}.items():
    for shape in ('disk', 'square', 'triangle'):
        folder = Path('shapes') / split / shape
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(picture(shape)).save(folder / f'{number}.png')

# %%
alexnet(
    'train',
    '--config=quickstart',
    '--init=runs/quickstart',
    '--workdir=runs/shapes',
    f'--config.data.source=folder:{Path("shapes").resolve()}',
    '--config.model.num_classes=auto',
    '--config.optimizer.schedule=constant',
    '--config.train.batch_size=40',
    '--config.train.steps=240',
)

# %%
shapes = alexnet_jax.load('runs/shapes')
files = sorted(Path('shapes/validation').glob('*/*.png'))
wrong = [
    file for file, best in zip(files, shapes.predict(files, top=1), strict=True) if best[0]['class'] != file.parent.name
]
error = len(wrong) / len(files)
print(f'top-1 error on {len(files)} new pictures: {error:.1%}; by chance 66.7%')

# %% [markdown]
# The [documentation](https://github.com/OWNER/alexnet_jax/blob/main/docs/python.md) has the whole API.
