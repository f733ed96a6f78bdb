"""Learned policies. Empty in this version: train with any Gymnasium library on ``LLMSched-v0``."""
