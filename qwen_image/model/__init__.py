"""The MMDiT: blocks, joint attention, rotary positions, modulation."""
