"""A stock Flower app: plain peft and torch on the clients, one fedpeft strategy on the server."""

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from fedpeft.strategies import FedSVD

server, client, RESULT = ServerApp(), ClientApp(), []
SMALL = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=24, num_hidden_layers=2, num_labels=10)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])


def build():
    torch.manual_seed(0)
    return get_peft_model(ViTForImageClassification(SMALL), LORA)


@client.train()
def train(message, context):
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    digits, model = load_digits(), build()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    x = torch.tensor(digits.images[part:200:parts] / 16).float()[:, None]
    y = torch.tensor(digits.target[part:200:parts])
    trained = [value for name, value in model.named_parameters() if value.requires_grad and "lora_A" not in name]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
        optimizer.step()
    arrays, metrics = ArrayRecord(get_peft_model_state_dict(model)), MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    RESULT.append(FedSVD().start(grid, ArrayRecord(get_peft_model_state_dict(build())), num_rounds=3))
