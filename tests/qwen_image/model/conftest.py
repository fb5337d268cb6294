"""Fixtures of the model's tests."""

from tests.helpers.joint_layout_reference import on_device

__all__ = ["on_device"]
