"""A client knows nothing of fedpeft: it takes peft's tensors, trains, and sends them back.

`trains` is what the strategy says that clients train, as `B, head`: FedSVD and FFA-LoRA leave A alone.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from digits_app import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A client's part of a round."""
    model, told = task.build(), message.content["config"]
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    images, labels = task.records(context.node_config["partition-id"], context.node_config["num-partitions"])
    trained = [
        value
        for name, value in model.named_parameters()
        if value.requires_grad and not ("lora_A" in name and "A" not in told["trains"])
    ]
    optimizer = torch.optim.AdamW(trained, lr=told["lr"])
    for _ in range(told["local-steps"]):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(labels), "train_loss": loss.item()})
    content = {"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)
