"""Models with weights of their own, by name: of timm, a model hub, a folder."""
