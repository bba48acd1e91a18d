"""Students from and to other tools: timm's layout (`timm_layout`) and the published checkpoints (`published_file`)."""
