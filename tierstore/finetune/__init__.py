"""`tierstore finetune`: fine-tunes a model folder on text or conversations, resumes by itself, and writes what plain libraries load."""
