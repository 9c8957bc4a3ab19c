"""Experiment trackers, behind one small interface. Only global rank 0 has any.

::

    engine -> Tracking    rate-limited; rows once they are not computed anew
                |-- tracking/steps.jsonl and history.csv on the disk
                |       \\-- wandb_worker.py, a process of its own -> W&B (or `dtrain sync`, later)
                \\-- a thread each, which has the history: TensorBoard and trackio by way of Accelerate's trackers, and
                    mlflow_tracker.py -> MLflow (or `dtrain sync`, later)

Nothing is loaded here: who sends to W&B, and who only reads runs, needs no torch.
"""
