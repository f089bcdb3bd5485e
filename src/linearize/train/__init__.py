"""Bringing quality back: alignment, then distillation, both on one `transformers.Trainer` subclass."""
