"""Arms over the stages of the method, and the memory of what they gave."""
