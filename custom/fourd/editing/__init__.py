"""Editing of moving scenes: plan, worker, buffer and executors of Instruct 4D-to-4D."""
