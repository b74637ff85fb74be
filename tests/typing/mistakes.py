"""Mistakes of users: a type checker reports each in the line that names its code, and nothing else."""

import numpy as np

import fastbn
from fastbn.graph.reasons import REASONS, Refusal

x, mean, var = np.ones((2, 3), np.float32), np.zeros(3), np.ones(3)
weight, bias = np.ones(3), np.zeros(3)
stats = fastbn.batch_stats(x)

# Closed sets of strings.
fastbn.batch_norm(x, mean, var, activation="rleu")  # error: call-overload
fastbn.batch_norm_train(x, activation="ReLU")  # error: call-overload
fastbn.batch_norm_backward(x, x, stats, activation="gelu")  # error: call-overload
fastbn.BatchNorm(3, activation="rleu")  # error: arg-type
layer = fastbn.BatchNorm(3)
layer.activation = "rleu"  # error: assignment

# The number of results.
dx, dweight = fastbn.batch_norm_backward(x, x, stats, weight, bias)  # error: misc
dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(x, x, stats, weight, bias)  # error: misc
dx, dweight, dbias = fastbn.batch_norm_backward(x, x, stats, weight, bias, residual=x)  # error: misc
y = fastbn.batch_norm_train(x)
print(y.shape)  # error: attr-defined
dx, maybe, nothing = fastbn.batch_norm_backward(x, x, stats)
maybe.sum()  # error: union-attr

# Names and kinds of arguments.
fastbn.batch_norm(x, mean)  # error: call-overload
fastbn.batch_norm(x, mean, var, epsilon=1e-3)  # error: call-overload
fastbn.batch_norm([[1.0, 2.0]], mean, var)  # error: call-overload
fastbn.batch_norm(x, mean, var, eps="small")  # error: call-overload
fastbn.batch_norm(x, mean, var, weight, bias, 1e-3)  # error: call-overload
fastbn.batch_norm_train(x, running_mean=mean, momentum=None)  # error: call-overload
fastbn.batch_norm_backward(x, x, (6, mean, var))  # error: call-overload
fastbn.batch_stats(x, axis=1.0)  # error: arg-type
fastbn.batch_stats(None)  # error: arg-type
fastbn.fold_conv(x, None, mean, var, groups=1.5)  # error: call-overload
fastbn.fold_linear(x, None, mean, var, groups=1)  # error: call-overload
fastbn.BatchStats(2.5, mean, var)  # error: arg-type
fastbn.merge_stats(stats)  # error: arg-type
fastbn.BatchNorm("3")  # error: arg-type
fastbn.BatchNorm(3, comm=object())  # error: arg-type
print(layer.state_dict()["gamma"])  # error: typeddict-item
fastbn.set_num_threads("2")  # error: arg-type
fastbn.use_isa(512)  # error: arg-type
fastbn.fold(x)  # error: arg-type
fastbn.fold("in.onnx", "out.onnx")  # error: call-arg
fastbn.fold("in.onnx", verfy=False)  # error: call-arg
fastbn.fold("in.onnx", input_shapes={"x": 3})  # error: dict-item
fastbn.verify("in.onnx")  # error: call-arg

# Reasons and statuses.
Refusal("no-absorbor", "nothing takes it")  # error: arg-type
fastbn.Kept("n", ("BatchNormalization",), "overfow", "too large")  # error: arg-type
print(REASONS["too-farr"])  # error: index
result = fastbn.fold("in.onnx")
print(result.parity.ok)  # error: union-attr
print(fastbn.verify("in.onnx", "out.onnx").status == "fail")  # error: comparison-overlap

# Names that do not exist.
print(fastbn.batchnorm)  # error: attr-defined
print(fastbn.show_config()["gpu"])  # error: typeddict-item
print(stats.std)  # error: attr-defined

# Models and their results.
fastbn.fold(512)  # error: arg-type
fastbn.fold("in.onnx", only=["bn"], verfiy=False)  # error: call-arg
fastbn.fold("in.onnx", input_shapes={"x": "1,3"})  # error: dict-item
fastbn.fold("in.onnx", progress=True)  # error: arg-type
print(result.planning)  # error: attr-defined
result.save(7)  # error: arg-type
print(result.folded[0].node)  # error: attr-defined
print(result.kept[0].code == "trainig")  # error: comparison-overlap
print(result.to_dict()["folds"])  # error: typeddict-item
parity = fastbn.verify("in.onnx")  # error: call-arg
print(fastbn.verify("in.onnx", "out.onnx").status == "not run")  # error: comparison-overlap
deployment = fastbn.deploy("in.onnx", metric="top1")  # error: arg-type
fastbn.deploy("in.onnx", data=7)  # error: arg-type
fastbn.deploy("in.onnx", max_drop="1 %")  # error: arg-type
fastbn.deploy("in.onnx", quantise=True)  # error: call-arg
fastbn.deploy("in.onnx", progress=print, report=True)  # error: arg-type
print(deployment.status == "failed")  # error: comparison-overlap
print(deployment.shipped == "int8")  # error: comparison-overlap
deployment.stage("int8")  # error: arg-type
print(deployment.stage("folded").drop)  # error: union-attr
deployment.shipped = "folded"  # error: misc
print(deployment.stages[0].path)  # error: attr-defined
print(deployment.latency[0]["mean_ms"])  # error: typeddict-item
