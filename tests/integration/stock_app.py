"""A stock Flower app: plain peft and torch on the clients, one fedpeft strategy on the server."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from fedpeft.strategies import FedSVD

server, client = ServerApp(), ClientApp()
RESULT = []


def build():
    torch.manual_seed(0)
    base = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=10,
        )
    )
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))


@client.train()
def train(message: Message, context: Context) -> Message:
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    digits, model = load_digits(), build()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    x, y = (
        torch.tensor(digits.images[part:200:parts] / 16).float()[:, None],
        torch.tensor(digits.target[part:200:parts]),
    )
    trained = [value for name, value in model.named_parameters() if value.requires_grad and "lora_A" not in name]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(get_peft_model_state_dict(model)),
        "metrics": MetricRecord({"num-examples": len(y)}),
    }
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    start = ArrayRecord(get_peft_model_state_dict(build()))
    RESULT.append(FedSVD().start(grid, start, num_rounds=3))
