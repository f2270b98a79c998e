"""What people look at: tables, quantities, pictures."""
