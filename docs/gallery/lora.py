"""LoRA on a Hugging Face language model; checkpoints hold the adapter alone."""

from pydoc_data.topics import topics  # Python's language reference

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import dtrain


def read_lines(samples):
    lines = [line.strip().encode() for name in sorted(topics) for line in topics[name].splitlines()]
    return [torch.tensor(list(line)) for line in [line for line in lines if 20 <= len(line) <= 80][:samples]]


def collate(lines):
    tokens = pad_sequence(lines, batch_first=True)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": tokens.masked_fill(tokens == 0, -100)}


def gpt2():  # without its weights: nothing is downloaded
    sizes = {"vocab_size": 256, "n_positions": 80, "n_embd": 64, "n_layer": 2, "n_head": 4}
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.1, bos_token_id=0, eos_token_id=0))


def build_model(base: str = "", rank: int = 8):
    model = AutoModelForCausalLM.from_pretrained(base).train() if base else gpt2()
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=True)
    return get_peft_model(model, lora) if rank else model


def build_dataloaders(samples: int = 1000, batch_size: int = 16):
    lines = read_lines(samples)
    cut = len(lines) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(lines[:cut], batch_size, shuffle=True, collate_fn=collate, generator=generator)
    return train, DataLoader(lines[cut:], 100, collate_fn=collate)


def build_optimizer(model, lr: float = 1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train_step(model, batch):
    count = (batch["labels"][:, 1:] != -100).sum()  # the tokens that the loss is a mean over
    return dtrain.Mean(model(**batch).loss * count, count)


valid_step = train_step


def predict_step(model, batch):  # the character that follows each line
    last = batch["attention_mask"].sum(1) - 1
    return (
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[torch.arange(len(last)), last]
        .argmax(1)
    )
