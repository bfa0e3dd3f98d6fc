"""Train a Hugging Face model in MXFP4: ``python examples/convert_huggingface.py``.

The model is a small GPT-2 with random weights, so that nothing is downloaded; a pre-trained one
from ``AutoModelForCausalLM.from_pretrained`` is converted by the same line.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import megafp4

torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)
model = GPT2LMHeadModel(config)

megafp4.convert(model, "mxfp4", seed=1234)

tokens = torch.tensor([list(b"Four bits are enough for anybody, on average. ") + [10] * 18] * 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model.train()
for step in range(10):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")

print("\nGEMMs that ran:")
for formats, count in model.precision.ledger.by_format().items():
    print(f"  {formats:<16}{count:>5}")
