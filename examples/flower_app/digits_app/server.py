"""The server: a strategy of fedpeft, by its name in the run config, and an adapter that stock peft loads."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from digits_app import task
from fedpeft import registry

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, and what they come to."""
    told, model = context.run_config, task.build()
    strategy = registry.load("strategies", told["strategy"], "strategy")()
    images, labels = task.test_records()

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        with torch.no_grad():
            right = model(pixel_values=images).logits.argmax(1) == labels
        print(f"round {number}: accuracy {right.float().mean():.1%} of {len(labels)} test records", flush=True)
        return MetricRecord({"accuracy": float(right.float().mean())})

    result = strategy.start(
        grid,
        ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=told["rounds"],
        train_config=ConfigRecord(
            {"lr": told["lr"], "local-steps": told["local-steps"], "trains": list(strategy.trains)}
        ),
        evaluate_fn=evaluate,
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    if told["out"]:
        model.save_pretrained(told["out"])
