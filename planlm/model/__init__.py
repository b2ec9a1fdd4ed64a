"""Planner, action selection and the joint model."""
