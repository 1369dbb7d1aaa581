"""The model in the hands of other projects, each as its documentation shows it.

These files run in environments of their own, without Driftmill. `BENCH_FOLDER` holds the model and
its columns, `BENCH_ENGINE` says whether it is scikit-learn's or ONNX Runtime's.
"""
