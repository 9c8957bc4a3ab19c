# The cells of a notebook in the tutorial's function style, as they are: no import of dtrain.
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

digits = load_digits()
features = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
targets = torch.tensor(digits.target)
dl_train = DataLoader(TensorDataset(features[:400], targets[:400]), batch_size=32, shuffle=True)
dl_valid = DataLoader(TensorDataset(features[400:457], targets[400:457]), batch_size=32, shuffle=False)


class CnnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(in_channels=1, out_channels=8, kernel_size=3),
                nn.MaxPool2d(kernel_size=2, stride=2),
                nn.Flatten(),
                nn.Linear(72, 32),
                nn.ReLU(),
                nn.Linear(32, 10),
            ]
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def accuracy(y_pred, y_true):
    y_pred_cls = torch.argmax(nn.Softmax(dim=1)(y_pred), dim=1).data
    return torch.tensor(accuracy_score(y_true, y_pred_cls))


model = CnnModel()
model.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model.loss_func = nn.CrossEntropyLoss()
model.metric_func = accuracy
model.metric_name = "accuracy"


def train_step(model, features, labels):
    model.train()
    model.optimizer.zero_grad()

    predictions = model(features)
    loss = model.loss_func(predictions, labels)
    metric = model.metric_func(predictions, labels)

    loss.backward()
    model.optimizer.step()

    return loss.item(), metric.item()


@torch.no_grad()
def valid_step(model, features, labels):
    model.eval()

    predictions = model(features)
    loss = model.loss_func(predictions, labels)
    metric = model.metric_func(predictions, labels)

    return loss.item(), metric.item()
