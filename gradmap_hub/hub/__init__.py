"""Everything that talks to the Hugging Face Hub; the only importer of huggingface_hub."""
