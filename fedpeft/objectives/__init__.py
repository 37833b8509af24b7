"""An objective says what a model is trained to do: one file for each kind of job, looked up by `model.task`."""
