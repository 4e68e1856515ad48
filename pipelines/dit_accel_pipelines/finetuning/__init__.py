"""LoRA fine-tuning of video models through the attached methods: `dit-accel finetune`."""
