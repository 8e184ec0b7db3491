"""HF Trainer: fine-tune a transformers CLIPModel without drifting towards captions; metrics in a callback."""

import sys

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from dgs_kernels import OptimizerSurgery

tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
vision = {**tower, "image_size": 32, "patch_size": 8}
text = {**tower, "vocab_size": 99, "eos_token_id": 98}
torch.manual_seed(0)
# `CLIPModel.from_pretrained(name)` gives trained weights instead.
clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
clip.requires_grad_(False).vision_model.requires_grad_(True)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip, self.head = clip, nn.Linear(16, 1)

    def forward(self, pixel_values, input_ids, labels=None):
        image = self.clip.get_image_features(pixel_values)
        image = getattr(image, "pooler_output", image)
        logits = self.head(image).squeeze(1)
        # What drags images to their captions is harmful to a detector of forgeries: content, not traces.
        caption = self.clip.get_text_features(input_ids)
        content = -torch.cosine_similarity(image, getattr(caption, "pooler_output", caption)).mean()
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, labels), "content": content}


class SurgeryTrainer(Trainer):
    def compute_loss(self, model, inputs, **_):
        with surgery.harmful():
            self.accelerator.backward(model(**inputs)["content"])
        return model(**inputs)["loss"]


class SurgeryMetrics(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        trainer.log(surgery.metrics().scalars())


model = Detector()
trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
surgery = OptimizerSurgery(optimizer, granularity="layer", rule="full")
caption = torch.tensor([5, 7, 98])
data = [{"pixel_values": torch.randn(3, 32, 32), "input_ids": caption, "labels": i % 2.0} for i in range(32)]
args = TrainingArguments(sys.argv[1], max_steps=4, use_cpu=True, report_to="tensorboard", save_strategy="no")
trainer = SurgeryTrainer(model, args, train_dataset=data, optimizers=(optimizer, None))
trainer.add_callback(SurgeryMetrics)
# The progress bar would print every number.
trainer.remove_callback(ProgressCallback)
trainer.train()
print(f"{len(surgery.metrics().layers)} layers, {surgery.metrics().removed.mean():.2%} of the energy removed")
