"""A tiny Qwen-Image that learns to draw the pictures of demo/pictures/, and what judges it (demo/train_drawing_model.py)."""
