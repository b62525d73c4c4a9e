"""Detects the format of a weight file by its content."""

import re

WANTED = "supported are PyTorch's .pth, .safetensors, .onnx and Caffe's .caffemodel"


class FormatError(ValueError):
    """Unusable file. The message is one line with the defect and the remedy; the caller adds the name of the file."""


# ir_version of onnx.ModelProto, and the next of its fields: a text, model_version, the graph or opset_import.
_ONNX = rb'\x08[\x02-\x20]([\x12\x1a\x22\x32]\0|[\x12\x1a\x22\x32].[ -~]|[\x28\x3a\x42])'
# First bytes of files that users pass by mistake, and the description of each in the error message.
_OTHERS = (
    (rb'\x89PNG|\xff\xd8\xff|GIF8|BM....\0\0\0\0|II\*\0|MM\0\*|RIFF....WEBP', 'a picture'),
    (rb'%PDF', 'a PDF'),
    (
        rb'\s*<(!doctype\s+html|html)',
        'a web page, perhaps the error page of a failed download; download the file again',
    ),
    (rb'\s*<', 'XML or a web page; download the file again'),
    (rb'version https://git-lfs', 'a Git LFS pointer; download the file itself with git lfs pull'),
    (rb'\x89HDF\r\n\x1a\n', "HDF5, such as Keras' .h5 or Caffe's .caffemodel.h5"),
    (
        rb'\x93NUMPY.{1,300}\|O',
        'Python objects in a NumPy file, such as bvlc_alexnet.npy; convert the .caffemodel or .onnx of bvlc_alexnet',
    ),
    (rb'\x93NUMPY', 'a NumPy array (.npy); a mean of images is given as --mean'),
    (rb'MATLAB [57]\.\d MAT-file', "MATLAB's .mat, such as MatConvNet's imagenet-caffe-alex.mat"),
    (rb'GGUF|gg(ml|jt|mf)|(ml|tj|fm)gg', 'a language model (GGUF)'),
    (rb'.{4}TFL3', 'TensorFlow Lite (.tflite)'),
    (rb'.{4}ET\d\d', 'ExecuTorch (.pte)'),
    (rb'\x08\x01\x12.{1,5}?\x0a.{1,3}?\x12', "TensorFlow's SavedModel (saved_model.pb)"),
    (rb'\x08[\x01-\x20]\x12.{1,5}?\x0a.{1,3}?\x0a', "Apple's Core ML (.mlmodel)"),
    (rb'\x0a.{1,3}?\x0a[\x01-\x7f][ -~]+\x12', 'a TensorFlow graph (.pb)'),
    (rb'\x12\x01\0{6}', "MXNet's .params"),
    (rb'[\x81-\x8f][\xa0-\xbf\xd9]', "MessagePack, such as Flax' .msgpack"),
    (rb'\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd', 'a compressed file; unpack it first'),
    (
        rb'.{257}ustar',
        'a tar archive; unpack it, or, if torch.save wrote it in 2016, load and save it again with torch',
    ),
    (rb'\s*(#.*\n\s*)*(name\s*:|layers?\s*\{|input)', 'a Caffe prototxt, which describes a network but has no weights'),
    (rb'\s*[{\[]', 'JSON'),
    (rb'\x80[\x00-\x01]|\x7fELF|MZ', 'a program or other binary file'),
)


def detect_format(path: str) -> str:
    """Returns the format of `path`: 'torch', 'safetensors', 'onnx' or 'caffe'.

    Raises:
      FormatError: The file has another format, which the message names if known.
      OSError: The file is unreadable.
    """
    with open(path, 'rb') as file:
        start = file.read(1024)
    if not start:
        raise FormatError(f'an empty file; {WANTED}')
    if start[:4] == b'PK\x03\x04' or re.match(rb'\x80[\x02-\x05]', start):
        return 'torch'
    if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') <= 100_000_000:  # maximum header length
        return 'safetensors'
    if re.match(_ONNX, start, re.DOTALL):
        return 'onnx'
    for pattern, what in _OTHERS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            raise FormatError(f'{what}; {WANTED}')
    # A protocol buffer message whose first field is one of NetParameter or, for a mean file, of BlobProto.
    if re.match(rb'[\x0a\x12]|\xa2\x06|\x08.\x10|[\x2a\x3a\x42]', start, re.DOTALL):
        return 'caffe'
    text = re.sub(rb'[^ -~]+', b' ', start[:40]).decode()
    raise FormatError(f'of an unknown format (it begins with {text!r}); {WANTED}')
