"""A plain loop: LoRA on a Hugging Face language model."""

from pydoc_data.topics import topics  # Python's language reference

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel


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


def main(epochs=4, samples=1000, batch_size=16, lr=1e-2, rank=8):
    torch.manual_seed(42)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=True)
    model = get_peft_model(gpt2(), lora)
    lines = read_lines(samples)
    cut = len(lines) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(lines[:cut], batch_size, shuffle=True, collate_fn=collate, generator=generator)
    valid = DataLoader(lines[cut:], 100, collate_fn=collate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch}
        for name, loader in (("", train), ("val_", valid)):
            model.train(loader is train)
            total = count = 0
            for batch in loader:
                with torch.set_grad_enabled(loader is train):
                    loss = model(**batch).loss
                if loader is train:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                number = (batch["labels"][:, 1:] != -100).sum().item()
                total, count = total + loss.item() * number, count + number
            row[f"{name}loss"] = total / count
        history.append(row)
        print(row)
    model.save_pretrained("adapter")
    return history


if __name__ == "__main__":
    main()
