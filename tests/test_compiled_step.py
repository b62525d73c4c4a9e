"""Properties of the compiled program of a narrow `paper` that make the step fast on a CPU."""

import math
import re
from collections import Counter

import pytest

from alexnet_jax.audit.hlo import HOLLOW, Program
from alexnet_jax.config import default_config, resolve
from alexnet_jax.shapes import LAYERS
from benchmarks.project import Project

WIDTHS = (16, 32, 32, 32, 32, 64, 48)
# Towers with the same inputs share one convolution.
CONVOLUTIONS = {'conv1': 1, 'conv2': 2, 'conv3': 1, 'conv4': 2, 'conv5': 2}
CONV1_MAPS = 8 * 15 * 15 * 16  # numbers in them


@pytest.fixture(scope='module')
def text() -> str:
    """Returns the HLO of the step on one device, with two towers and 8 images."""
    config = default_config()
    config.model.widths, config.model.num_classes = WIDTHS, 10
    config.data.image_size, config.data.crop_size = 72, 64
    config.train.batch_size, config.mesh.data = 8, 1
    project = Project(resolve(config))
    return project.train_step.lower(*project.train_arguments).compile().as_text()


@pytest.fixture(scope='module')
def program(text) -> Program:
    return Program(text)


@pytest.fixture(scope='module')
def alone(program) -> list:
    """The instructions outside fusions that compute or move data."""
    fused = {each.name for fusion in program.instructions.values() for each in fusion.fused}
    return [each for name, each in program.instructions.items() if name not in fused and each.opcode not in HOLLOW]


def numbers(instruction) -> int:
    """Elements of the largest result."""
    return max(math.prod(shape) for _, shape in instruction.tensors)


def materialized(program) -> list[tuple[int, ...]]:
    """Shapes of the results of layers.materialize(), and of sums over windows."""
    return [each.tensors[0][1] for each in program.instructions.values() if each.opcode == 'reduce-window']


@pytest.mark.slow
def test_towers_with_the_same_inputs_share_a_convolution(program, alone):
    found = Counter(program.part(each.name) for each in alone if each.opcode == 'convolution')
    forward = {(layer, 'forward'): count for layer, count in CONVOLUTIONS.items()}
    # By the weights and, but for the images, by the maps.
    backward = {(layer, 'backward'): count * (1 + (layer != 'conv1')) for layer, count in CONVOLUTIONS.items()}
    assert found == forward | backward


def test_state_is_updated_in_place(text, program, alone):
    [aliases] = re.findall(r'input_output_alias=\{(.*?) \}, ', text)
    pairs = re.findall(r'\{(\d+)\}: \((\d+), \{\}', aliases)
    assert [tuple(map(int, pair)) for pair in pairs] == [(i, i) for i in range(1 + 2 * 2 * len(LAYERS))]
    copied = [program.instructions[each.operands[0]].op_name for each in alone if each.opcode == 'copy']
    of_state = [name.replace('\\', '') for name in copied if name.startswith('state.')]
    # Convolutions have only 2 of the 61 million weights.
    assert not [name for name in of_state if re.match(r"state\.opt_state|state\.params\['fc\d'\]\['kernel'\]", name)]


def test_one_device_reduces_no_gradients(alone):
    summed = [numbers(each) for each in alone if each.opcode.startswith(('all-', 'reduce-scatter', 'collective-'))]
    assert all(count <= 3 for count in summed)  # what is logged


def test_pooling_compares_slices(program):
    opcodes = Counter(each.opcode for each in program.instructions.values())
    assert opcodes['select-and-scatter'] == 0
    assert materialized(program).count((1, 8, 7, 7, 16)) == 2  # conv1's maxima, and their positions in the windows


def test_convolution_inputs_are_materialized(program):
    conv2, conv3, conv4, conv5 = (1, 8, 7, 7, 8), (1, 8, 3, 3, 32), (1, 8, 3, 3, 16), (1, 8, 3, 3, 16)
    of_towers = Counter([conv2, conv2, conv3, conv4, conv4, conv5, conv5])
    assert of_towers <= Counter(materialized(program))


def test_conv1_moves_four_rows_into_the_channels(program, alone):
    of_conv1 = {
        program.part(each.name): each
        for each in alone
        if each.opcode == 'convolution' and program.part(each.name)[0] == 'conv1'
    }
    operands = of_conv1['conv1', 'forward'].operands
    images, kernel = (program.instructions[operand].tensors[0][1] for operand in operands)
    assert (images, kernel) == ((8, 17, 68, 12), (3, 11, 12, 16))
    assert (
        numbers(of_conv1['conv1', 'backward']) == 11 * 11 * 3 * 16
    )  # the weight gradient uses the original kernel shape


def test_bias_gradients_are_products(program, alone):
    dots = Counter(program.part(each.name)[0] for each in alone if each.opcode == 'dot' and each.tensors[0][1][0] == 1)
    assert dots == CONVOLUTIONS


def test_images_are_augmented_once_and_without_products(program, alone):
    [image] = [
        name for name, each in program.instructions.items() if each.op_name.replace('\\', '') == "batch['image']"
    ]
    assert len([each for each in alone if image in each.operands]) == 1
    assert (1, 8, 64, 64, 3) in materialized(program)
    assert {program.part(each.name)[0] for each in alone if program.flops(each.name)} == set(LAYERS)


# Arrays of their size that are written, and how often such arrays are read.
WRITTEN = {
    ('conv1', 'forward'): 1,
    ('conv1/lrn', 'forward'): 3,  # squares, their sums, what is multiplied with
    ('conv1/lrn', 'backward'): 5,  # the squares and sums again
    ('conv1/activation', 'backward'): 2,  # for the gradients of bias and kernel
}
READ = {
    ('conv1/lrn', 'forward'): 3,
    ('conv1/pool', 'forward'): 4,  # for the maxima and for where they are
    ('conv1/lrn', 'backward'): 7,
    ('conv1/activation', 'backward'): 6,
    ('conv1', 'backward'): 2,
}


def test_conv1_maps_are_not_read_or_written_more_often(program, alone):
    maps = {name for name, each in program.instructions.items() if numbers(each) == CONV1_MAPS}
    assert Counter(program.part(each.name) for each in alone if each.name in maps) <= Counter(WRITTEN)
    assert Counter(program.part(each.name) for each in alone for name in each.operands if name in maps) <= Counter(READ)


def test_powers_are_roots(program):
    assert 'power' not in {each.opcode for each in program.instructions.values()}
